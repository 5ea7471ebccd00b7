"""SUPERB's data sets: layouts, preparation, and generated stand-ins."""
