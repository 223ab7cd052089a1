"""Result table, HTML page and text records of a study."""
