"""Runs on clusters: health check, site files, job scripts, submission, and the shell scripts that start ranks."""
