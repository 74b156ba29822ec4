"""What the package writes for people: words of a vocabulary, HTML pages, files that are whole or not there."""
