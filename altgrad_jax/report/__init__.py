"""From work directories to tables: what runs are compared by, and where they cannot be compared."""
