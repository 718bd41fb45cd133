"""Starting runs on clusters: health check, site files, job scripts, submission. The top of the package, beside the command line."""
