"""Long jobs made of the other commands: the demo, pre-training in two phases, binarization in stages."""
