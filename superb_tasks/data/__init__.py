"""SUPERB's data sets: their layouts, what is prepared from them, and generated stand-ins."""
