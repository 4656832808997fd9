"""Settings: the typed schema, YAML in and out, overrides."""
