"""HTML that is rendered here, without a script and without anything from another host."""
