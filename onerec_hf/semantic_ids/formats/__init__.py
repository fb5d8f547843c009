"""Import and export of semantic IDs in the formats of other projects."""
