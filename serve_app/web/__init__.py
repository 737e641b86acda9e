"""HTML pages rendered by the service, without scripts and without resources of other hosts."""
