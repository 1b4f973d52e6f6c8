-- Who works on which trial. A lease is alive until expires_at, by the database's clock; `attempt` is its fencing token.

-- fragment: going_on
-- Whether trials of the study may be taken, as of the transaction's begin.
(status IN ('open', 'exhausted') AND NOT coalesce(deadline <= now(), false))

-- fragment: lease_end
clock_timestamp() + lease_s * interval '1 s'

-- fragment: touch_worker
-- Note that the worker lives, without waiting for another of its threads that does so at the same time.
UPDATE hpo.workers SET seen_at = clock_timestamp()
WHERE worker = (SELECT worker FROM hpo.workers WHERE worker = %(worker)s FOR NO KEY UPDATE SKIP LOCKED)

-- fragment: held
-- The lease, while it is alive and still the worker's.
trial_id = %(trial)s AND attempt = %(attempt)s AND worker = %(worker)s AND ended_at IS NULL
AND expires_at > clock_timestamp()

-- Taking a trial: these eight statements go together in one round trip and transaction, under the lock on the study's
-- row. They are separate so that each sees what was committed while an earlier one waited. Whether a lease has run out
-- is decided as of the transaction's begin, now(), so that they agree. The trial taken is left in hpo.calls: a
-- repetition finds it there and takes nothing more.

-- name: take_lock
-- Step 1: lock the study's row.
-- prepared: study int
{lock_study_row}

-- name: take_touch
-- Step 2: note that the worker lives.
-- prepared: worker text
{touch_worker}

-- name: take_end_foreign
-- Step 3: end the leases of trials that somebody else ended: a plain script, a dashboard.
-- prepared: study int
UPDATE hpo.leases l SET ended_at = clock_timestamp() FROM trials t
WHERE l.study_id = %(study)s AND l.ended_at IS NULL AND l.trial_id = t.trial_id AND t.state <> 'RUNNING'

-- name: take_fail_spent
-- Step 4: fail the trials whose lease was lost once too often, and say why.
-- prepared: study int
WITH spent AS (UPDATE hpo.leases l SET ended_at = clock_timestamp(), lost = lost + 1 FROM hpo.terms s
    WHERE l.study_id = %(study)s AND s.study_id = l.study_id AND ended_at IS NULL AND expires_at <= now()
    AND NOT released AND lost + 1 >= max_attempts RETURNING trial_id, worker, lost, epoch),
failed AS (UPDATE trials t SET state = 'FAIL', datetime_complete = {utc_now} FROM spent s
    WHERE t.trial_id = s.trial_id AND t.state = 'RUNNING' RETURNING t.trial_id)
INSERT INTO trial_user_attributes (trial_id, key, value_json)
SELECT trial_id, 'failure', to_json('given up after ' || lost || ' attempts: each time its worker went silent or '
    'made no progress, the last time ' || worker || coalesce(' after epoch ' || epoch, ''))
FROM spent JOIN failed USING (trial_id)
ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json

-- name: take_adopt
-- Step 5: adopt the trial whose lease ran out or was given back first.
-- prepared: study int, worker text, device text, client uuid, call bigint
WITH adopted AS (UPDATE hpo.leases l SET attempt = attempt + 1, lost = lost + (NOT released)::int, released = false,
        worker = %(worker)s, device = %(device)s, progress = 0, progress_at = clock_timestamp(),
        epoch = checkpoint_epoch, metric = NULL, expires_at = {lease_end}
    FROM hpo.terms s
    WHERE s.study_id = %(study)s AND {going_on} AND NOT EXISTS (SELECT FROM hpo.calls WHERE {this_call})
    AND trial_id = (SELECT trial_id FROM hpo.leases WHERE study_id = %(study)s AND ended_at IS NULL
        AND expires_at <= now() ORDER BY expires_at LIMIT 1 FOR UPDATE)
    RETURNING trial_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM adopted {claim}

-- name: take_forget_reports
-- Step 6: remove the adopted trial's reports of epochs after its checkpoint, which are trained again.
-- prepared: client uuid, call bigint
DELETE FROM trial_intermediate_values i USING hpo.calls c, hpo.leases l
WHERE {this_call} AND l.trial_id = c.result AND l.attempt > 1 AND i.trial_id = l.trial_id
AND i.step > coalesce(l.checkpoint_epoch, -1)

-- name: take_start
-- Step 7: where nothing was adopted and the budget allows it, start a waiting or a new trial.
-- prepared: study int, worker text, device text, client uuid, call bigint
WITH counted AS (UPDATE hpo.terms SET started = started + 1
    WHERE study_id = %(study)s AND {going_on} AND status = 'open' AND started < budget
    AND NOT EXISTS (SELECT FROM hpo.calls WHERE {this_call}) RETURNING lease_s),
popped AS (UPDATE trials SET state = 'RUNNING', datetime_start = {utc_now}
    WHERE EXISTS (TABLE counted) AND trial_id = (SELECT trial_id FROM trials
        WHERE study_id = %(study)s AND state = 'WAITING' ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING trial_id),
made AS (INSERT INTO trials (study_id, number, state, datetime_start)
    SELECT %(study)s, {next_number}, 'RUNNING', {utc_now}
    FROM counted WHERE NOT EXISTS (TABLE popped) RETURNING trial_id),
taken AS (TABLE popped UNION ALL TABLE made),
granted AS (INSERT INTO hpo.leases (trial_id, study_id, worker, device, expires_at, progress_at)
    SELECT trial_id, %(study)s, %(worker)s, %(device)s, {lease_end}, clock_timestamp() FROM taken, counted)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM taken {claim}

-- name: take_result
-- Step 8: the lease that was taken, if any, and what is left of the study.
-- prepared: study int, client uuid, call bigint
SELECT l.study_id, l.trial_id, t.number, l.worker, l.attempt, l.attempt > 1, l.checkpoint_key, l.checkpoint_epoch,
    s.lease_s, s.status, coalesce(deadline <= now(), false), started >= budget, EXISTS (SELECT FROM hpo.leases f
        WHERE f.study_id = %(study)s AND f.ended_at IS NULL AND (f.expires_at > now() OR {going_on}))
FROM hpo.terms s LEFT JOIN hpo.calls c ON {this_call} LEFT JOIN hpo.leases l ON l.trial_id = c.result
    LEFT JOIN trials t ON t.trial_id = l.trial_id
WHERE s.study_id = %(study)s

-- name: renew
-- Renew a worker's leases with their progress; a lease that has run out stays so, one without progress for stall_s
-- runs out.
-- types: worker text, trials int[], attempts int[], progress bigint[], epochs int[], metrics float8[]
WITH reported AS (SELECT * FROM unnest(%(trials)s::int[], %(attempts)s::int[], %(progress)s::bigint[],
    %(epochs)s::int[], %(metrics)s::float8[]) AS b (trial_id, attempt, progress, epoch, metric)),
seen AS ({touch_worker}),
renewed AS (UPDATE hpo.leases l SET epoch = b.epoch, metric = b.metric, progress = b.progress,
        progress_at = CASE WHEN b.progress <> l.progress THEN clock_timestamp() ELSE l.progress_at END,
        expires_at = CASE WHEN b.progress <> l.progress
            OR l.progress_at > clock_timestamp() - s.stall_s * interval '1 s'
            THEN clock_timestamp() + s.lease_s * interval '1 s' ELSE l.expires_at END
    FROM reported b, hpo.terms s
    WHERE l.trial_id = b.trial_id AND l.attempt = b.attempt AND l.worker = %(worker)s AND s.study_id = l.study_id
    AND l.ended_at IS NULL AND l.expires_at > clock_timestamp() RETURNING l.trial_id)
SELECT b.trial_id, b.attempt, l.study_id, s.status, coalesce(s.deadline <= clock_timestamp(), false),
    b.trial_id IN (TABLE renewed) OR l.attempt = b.attempt AND l.ended_at IS NOT NULL
FROM reported b LEFT JOIN hpo.leases l USING (trial_id) LEFT JOIN hpo.terms s USING (study_id)

-- name: checkpoint
-- Name the artifact with the trial's state after an epoch, and keep the key of the one before.
-- types: trial int, attempt int, worker text, key text, epoch int, client uuid, call bigint
WITH named AS (UPDATE hpo.leases SET checkpoint_key = %(key)s, checkpoint_epoch = %(epoch)s,
    replaced_key = CASE WHEN checkpoint_key = %(key)s THEN replaced_key ELSE checkpoint_key END
    WHERE {held} RETURNING trial_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM named {claim}

-- name: replaced_checkpoint
-- The key of the checkpoint that the call has replaced.
-- types: client uuid, call bigint
SELECT replaced_key FROM hpo.leases JOIN hpo.calls ON trial_id = result WHERE {this_call}

-- name: spent_checkpoints
-- The checkpoints of ended trials that nobody has reported as deleted.
-- types: study int
SELECT key FROM hpo.leases, unnest(ARRAY[checkpoint_key, replaced_key]) AS key
WHERE study_id = %(study)s AND ended_at IS NOT NULL AND key IS NOT NULL

-- name: forget_checkpoints
-- Forget checkpoints of ended trials that have been deleted.
-- types: study int, keys text[]
UPDATE hpo.leases SET checkpoint_key = CASE WHEN checkpoint_key <> ALL(%(keys)s) THEN checkpoint_key END,
    replaced_key = CASE WHEN replaced_key <> ALL(%(keys)s) THEN replaced_key END
WHERE study_id = %(study)s AND ended_at IS NOT NULL
AND (checkpoint_key = ANY(%(keys)s) OR replaced_key = ANY(%(keys)s))

-- name: release
-- Give a trial back at once.
-- types: trial int, attempt int, worker text
UPDATE hpo.leases SET expires_at = clock_timestamp(), released = true WHERE {held}

-- name: acquire_promotion
-- Take or renew the lease to promote: nothing more is started, no lease is alive and, but for a deadline, none waits
-- for adoption.
-- types: study int, worker text
UPDATE hpo.terms s SET promoter = %(worker)s,
    promoter_expires_at = clock_timestamp() + lease_s * interval '1 s'
WHERE study_id = %(study)s AND status IN ('open', 'exhausted') AND promoted_version IS NULL
AND (promoter IS NULL OR promoter = %(worker)s OR promoter_expires_at <= clock_timestamp())
AND (status = 'exhausted' OR started >= budget OR {out_of_time})
AND NOT EXISTS (SELECT FROM hpo.leases l JOIN trials t USING (trial_id)
    WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING'
    AND (l.expires_at > clock_timestamp() OR NOT {out_of_time}))
RETURNING lease_s

-- name: release_promotions
-- Leave what a worker has begun to promote to the next one.
-- types: worker text
UPDATE hpo.terms SET promoter = NULL, promoter_expires_at = NULL
WHERE promoter = %(worker)s AND status IN ('open', 'exhausted') RETURNING study_id

-- name: finish_promotion
-- Record the promoted version, and with it that the study is finished; no row where the promotion passed to another
-- worker.
-- types: study int, worker text, version int
UPDATE hpo.terms SET promoted_version = %(version)s, status = 'finished', promoter_expires_at = NULL
WHERE study_id = %(study)s AND promoter = %(worker)s AND
    (promoter_expires_at > clock_timestamp() OR status = 'finished'
    AND promoted_version IS NOT DISTINCT FROM %(version)s)
RETURNING study_id
