"""Where text comes from: shards on disk, the hub, a person's own files, the Python that is running."""
