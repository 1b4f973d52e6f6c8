-- Who may use the service, and what they did.

-- fragment: active
revoked_at IS NULL AND coalesce(expires_at > hpo.clock(), true)

-- fragment: token
token_id, role, owner, created_at, expires_at, revoked_at, {active}

-- name: add_token
-- Let somebody in.
-- types: token text, digest bytea, role text, owner text, lifetime_s float8
INSERT INTO hpo.tokens (token_id, digest, role, owner, created_at, expires_at)
VALUES (%(token)s, %(digest)s, %(role)s, %(owner)s, hpo.clock(), hpo.clock() + %(lifetime_s)s * interval '1 s')
ON CONFLICT DO NOTHING

-- name: tokens
-- Every token, oldest first.
SELECT {token} FROM hpo.tokens ORDER BY created_at, token_id

-- name: token_digest
-- The digest of a token's secret, and the token, while it opens the door.
-- prepared: token text
SELECT digest, {token} FROM hpo.tokens WHERE token_id = %(token)s AND {active}

-- name: admissions
-- For each request, in their order: the digest of its token's secret and the token, while it opens the door; and the
-- version that it asks for by number or alias.
-- prepared: tokens text[], names text[], wanted text[]
SELECT t.*, v.version, v.made_at
FROM unnest(%(tokens)s::text[], %(names)s::text[], %(wanted)s::text[]) WITH ORDINALITY AS r (token, name, wanted, place)
LEFT JOIN LATERAL (SELECT digest, {token} FROM hpo.tokens WHERE token_id = r.token AND {active}) t ON true
LEFT JOIN LATERAL (SELECT version, created_at AS made_at FROM hpo.models m WHERE m.name = r.name AND m.version =
    coalesce((SELECT version FROM hpo.aliases a WHERE a.name = r.name AND a.alias = r.wanted),
        CASE WHEN r.wanted ~ '^[1-9][0-9]{0,8}$' THEN r.wanted::int END)) v ON true
ORDER BY r.place

-- name: revoke_token
-- From now on it opens nothing.
-- types: token text
UPDATE hpo.tokens SET revoked_at = coalesce(revoked_at, hpo.clock()) WHERE token_id = %(token)s

-- name: note_action
-- Keep who did what.
-- types: owner text, token text, action text, subject text, detail jsonb
INSERT INTO hpo.audit (happened_at, owner, token_id, action, subject, detail)
VALUES (hpo.clock(), %(owner)s, %(token)s, %(action)s, %(subject)s, %(detail)s)

-- name: actions
-- What was done, the newest first.
-- types: subject text, most int
SELECT happened_at, owner, token_id, action, subject, detail FROM hpo.audit
WHERE subject = coalesce(%(subject)s, subject) ORDER BY entry DESC LIMIT %(most)s

-- name: claim_submission
-- Let a key of an owner mean a study, unless it means one already.
-- types: owner text, key text, study_name text, digest text
INSERT INTO hpo.submissions (owner, idempotency_key, study_name, digest, submitted_at)
VALUES (%(owner)s, %(key)s, %(study_name)s, %(digest)s, hpo.clock()) ON CONFLICT DO NOTHING

-- name: submission
-- What a key of an owner means.
-- types: owner text, key text
SELECT study_name, digest FROM hpo.submissions WHERE owner = %(owner)s AND idempotency_key = %(key)s

-- name: forget_old_submissions
-- Forget the keys of a month ago.
DELETE FROM hpo.submissions WHERE submitted_at < hpo.clock() - interval '30 days'

-- name: study_owner
-- Who submitted a study; NULL: nobody through the service.
-- types: study int
SELECT owner FROM hpo.terms WHERE study_id = %(study)s

-- name: annotated_study
-- Name and owner of a study, or of the study of a trial.
-- types: study int, trial int
SELECT study_name, owner FROM studies LEFT JOIN hpo.terms USING (study_id)
WHERE study_id = coalesce(%(study)s, (SELECT trials.study_id FROM trials WHERE trial_id = %(trial)s))

-- name: any_token
-- Whether anybody may come in.
SELECT EXISTS (SELECT FROM hpo.tokens WHERE {active})

-- name: begin_session
-- Let a browser in for its token's holder, for some hours and never longer than the token; how long that is.
-- types: digest bytea, token text, lifetime_s float8
INSERT INTO hpo.sessions (digest, token_id, created_at, expires_at)
SELECT %(digest)s, token_id, hpo.clock(),
    least(hpo.clock() + %(lifetime_s)s * interval '1 s', coalesce(expires_at, 'infinity'))
FROM hpo.tokens WHERE token_id = %(token)s AND {active}
ON CONFLICT (digest) DO UPDATE SET token_id = EXCLUDED.token_id -- an answer was lost
RETURNING extract(epoch FROM expires_at - hpo.clock())::float8

-- name: session_holder
-- The token of a browser that is signed in, while it opens the door.
-- prepared: digest bytea
SELECT {token} FROM hpo.tokens WHERE {active} AND token_id =
    (SELECT session.token_id FROM hpo.sessions session WHERE digest = %(digest)s AND session.expires_at > hpo.clock())

-- name: end_session
-- A browser is signed out.
-- types: digest bytea
DELETE FROM hpo.sessions WHERE digest = %(digest)s

-- name: forget_old_sessions
-- Forget the browsers whose time is over.
DELETE FROM hpo.sessions WHERE expires_at <= hpo.clock()
