"""`moetrain bench`: speed and memory on this machine, as ratios within one run. One module per subject; `measure` is what they share."""
