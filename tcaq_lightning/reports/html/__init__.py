"""report.html of a finished run: one page with everything in it, which needs neither network nor further files."""
