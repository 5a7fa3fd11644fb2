"""The page of tools.watch: what it shows, how it is served, and its three files."""
