"""File formats: to arrays, and for the formats others read, back to files."""
