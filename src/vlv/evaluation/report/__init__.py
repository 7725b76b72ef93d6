"""Reports of measured runs: a page to look at, a document to commit, the paper beside them."""
