"""The report as one HTML page. Read `render.py` first: it collects the page's data and fills in the page."""
