"""The report of a run: page, Markdown, pictures."""
