-- name: try_lock
-- Take the lock of that name, unless another connection holds it; whether it was taken.
-- types: name text
SELECT pg_try_advisory_lock(hashtextextended('hpo.alone ' || %(name)s, 0))
