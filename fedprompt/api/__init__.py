"""What a notebook calls; the public names are those of the package ``fedprompt`` itself."""
