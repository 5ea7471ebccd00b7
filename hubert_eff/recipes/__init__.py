"""Long jobs that run other commands: the demo, pre-training in two phases, binarization in stages."""
