"""Pages for people: server-rendered, usable without JavaScript, which only keeps them up to date."""
