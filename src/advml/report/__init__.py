"""The result table and the HTML page of a study."""
