"""Where a config runs: one typed description, a pure renderer to text for each kind of cluster, and a check of the nodes before the first step."""
