"""What a run looks like to people: curves and the HTML page."""
