"""The service: data in, model out over HTTP, for people who have neither a shell here nor the database's password."""
