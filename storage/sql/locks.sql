-- Locks that one process holds at a time, of all that share a database. A holder that is not heard of loses its lock.

-- name: hold_lock
-- Take or renew the lock of that name, unless somebody else holds it; a row where it is the holder's. After a start of
-- the server everybody has the time of a lease again.
-- types: name text, holder uuid, lease_s float8
INSERT INTO hpo.locks AS l (name, holder, expires_at)
VALUES (%(name)s, %(holder)s, hpo.clock() + %(lease_s)s * interval '1 s')
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
WHERE l.holder = excluded.holder OR greatest(l.expires_at, CASE WHEN l.expires_at - %(lease_s)s * interval '1 s'
    < hpo.server_started() THEN hpo.server_started() + %(lease_s)s * interval '1 s' END) <= hpo.clock() RETURNING name

-- name: leave_lock
-- Let others have the lock of that name, if the holder still has it.
-- types: name text, holder uuid
DELETE FROM hpo.locks WHERE name = %(name)s AND holder = %(holder)s
