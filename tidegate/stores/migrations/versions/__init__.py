"""One file a migration, numbered; each says what it follows in `down_revision`."""
