"""An example: a transport of one's own."""
