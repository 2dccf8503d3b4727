"""Many pairs registered in one run: workers, resuming, a table, a page to judge them, statistics of the group."""
