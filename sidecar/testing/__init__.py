"""For tests, ours and those of users: a local broker and database, memory adapters, record builders. Import what you need from the modules."""
