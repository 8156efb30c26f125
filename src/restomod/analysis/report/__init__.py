"""Report of a run: HTML page, Markdown and PNG."""
