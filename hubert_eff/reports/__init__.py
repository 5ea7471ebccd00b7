"""Tables, plots and pages of figures: costs, the paper's tables, benchmarks, training logs."""
