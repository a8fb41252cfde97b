"""Several training runs as one experiment: its plan, its runs, and what came out of them."""
