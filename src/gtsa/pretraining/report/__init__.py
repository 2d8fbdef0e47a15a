"""gtsa report: the page of a run."""
