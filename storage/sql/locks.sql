-- name: lock_exclusively
-- Wait for the lock of that name, however long another connection holds it.
-- types: name text
SELECT pg_advisory_lock(hashtextextended('hpo.alone ' || %(name)s, 0))
