"""The generated stand-ins for SUPERB's data sets, one module per data set; `superb_tasks.data.corpus` makes any of them."""
