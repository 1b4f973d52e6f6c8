-- Notices to the addresses that studies name. The triggers of migration 0004 write them.

-- fragment: notice
notice, study_id, study_name, url, event, body, created_at, attempts, next_at, delivered_at, fault

-- name: set_notify
-- Let an address be told of a study, and of what.
-- types: study int, url text, events text[]
UPDATE hpo.terms SET notify_url = %(url)s, notify_on = %(events)s WHERE study_id = %(study)s

-- name: note_failure
-- Give notice that a study fails, unless the last such notice of it gave the same reason.
-- types: study int, reason text
SELECT hpo.give_notice(%(study)s, 'study.failure', jsonb_build_object('reason', %(reason)s::text))
WHERE %(reason)s IS DISTINCT FROM (SELECT body ->> 'reason' FROM hpo.notices
    WHERE study_id = %(study)s AND event = 'study.failure' ORDER BY notice DESC LIMIT 1)

-- name: claim_notices
-- Take notices that are due, of one study or of any. The time of the next attempt is set before this one is made: two
-- senders do not make the same one, and that of a sender that dies is made again. It is twice as far away each time,
-- from first_s seconds to longest_s, and up to a quarter more; there are `most` attempts.
-- types: study int, count int, first_s float8, longest_s float8, most int
WITH due AS MATERIALIZED (SELECT notice AS due_notice FROM hpo.notices
    WHERE next_at <= hpo.clock() AND study_id = coalesce(%(study)s, study_id)
    ORDER BY next_at LIMIT %(count)s FOR UPDATE SKIP LOCKED)
UPDATE hpo.notices n SET attempts = attempts + 1, next_at = CASE WHEN attempts + 1 < %(most)s THEN hpo.clock()
    + least(%(longest_s)s, %(first_s)s * 2 ^ attempts) * (1 + random() / 4) * interval '1 s' END
FROM due WHERE notice = due_notice RETURNING {notice}

-- name: complete_notice
-- Add what is known of the study when the notice is first sent; its body then stays as it is.
-- types: notice bigint, more jsonb
UPDATE hpo.notices SET body = body || %(more)s WHERE notice = %(notice)s AND NOT jsonb_exists(body, 'trials')

-- name: one_notice
-- A notice.
-- types: notice bigint
SELECT {notice} FROM hpo.notices WHERE notice = %(notice)s

-- name: notice_delivered
-- There are no further attempts.
-- types: notice bigint
UPDATE hpo.notices SET delivered_at = hpo.clock(), next_at = NULL, fault = NULL WHERE notice = %(notice)s

-- name: notice_failed
-- Keep why an attempt failed, unless another one was made since.
-- types: notice bigint, attempts int, fault text
UPDATE hpo.notices SET fault = %(fault)s
WHERE notice = %(notice)s AND attempts = %(attempts)s AND delivered_at IS NULL

-- name: forget_old_notices
-- Forget the notices of a month ago that nobody sends any more.
DELETE FROM hpo.notices WHERE next_at IS NULL AND created_at < hpo.clock() - interval '30 days'

-- name: notices
-- The last notices, the newest first; of one study, or of all.
-- types: study text, most int
SELECT {notice} FROM hpo.notices WHERE study_name = coalesce(%(study)s, study_name) ORDER BY notice DESC LIMIT %(most)s

-- name: notices_due
-- How many notices could be sent now, of one study or of any.
-- types: study int
SELECT count(*) FROM hpo.notices WHERE next_at <= hpo.clock() AND study_id = coalesce(%(study)s, study_id)
