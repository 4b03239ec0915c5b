"""Pictures of label maps and values: what is read, in which colours, and how it is laid out."""
