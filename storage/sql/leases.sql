-- Who works on which trial. `attempt` is the fencing token: whoever holds the last one, and has not given it back, may
-- write. A lease that was not renewed in time may be taken over; until that is done its holder goes on.

-- fragment: lease_time
s.lease_s * interval '1 s'

-- fragment: free
-- Whether the trial may be adopted: it was given back, or its holder is taken for dead.
(l.released OR l.lost_attempt IS NOT DISTINCT FROM l.attempt)

-- fragment: waited_for
-- Until when the holder is waited for: for the time of its lease, and after a start of the server for that time again.
greatest(l.expires_at, CASE WHEN l.renewed_at < hpo.server_started() THEN hpo.server_started() + {lease_time} END)

-- fragment: alive
-- Whether a trial's holder counts as at work on it.
(l.ended_at IS NULL AND NOT {free} AND {waited_for} > hpo.moment())

-- fragment: capped
-- Whether as many of the study's trials are at work as it allows.
coalesce(s.max_workers <= (SELECT count(*) FROM hpo.leases l WHERE l.study_id = s.study_id AND {alive}), false)

-- fragment: touch_worker
-- Note that the worker lives, without waiting for another of its threads that does so at the same time.
UPDATE hpo.workers SET seen_at = hpo.clock()
WHERE worker = (SELECT worker FROM hpo.workers WHERE worker = %(worker)s FOR NO KEY UPDATE SKIP LOCKED)

-- fragment: lapse
-- Take the holder for dead. The loss counts where the attempt got no further than the one before, by its checkpoints,
-- and the server was there all the time.
lost_attempt = l.attempt,
lost = CASE WHEN {further} THEN 0 ELSE l.lost + ({counts})::int END,
lost_progress = CASE WHEN {counts} THEN l.progress END

-- fragment: further
coalesce(l.checkpoint_epoch, -1) > coalesce(l.began_epoch, -1)

-- fragment: counts
(NOT {further} AND l.renewed_at >= hpo.server_started())

-- fragment: forgive
-- The loss of this attempt, if there was one, does not count.
lost = l.lost - (l.lost_attempt IS NOT DISTINCT FROM l.attempt AND l.lost_progress IS NOT NULL)::int,
lost_attempt = CASE WHEN l.lost_attempt IS DISTINCT FROM l.attempt THEN l.lost_attempt END,
lost_progress = CASE WHEN l.lost_attempt IS DISTINCT FROM l.attempt THEN l.lost_progress END

-- fragment: held
-- The lease, while it is the worker's.
trial_id = %(trial)s AND attempt = %(attempt)s AND worker = %(worker)s AND ended_at IS NULL AND NOT released

-- Taking a trial: these statements go together in one round trip and transaction, under the lock on the study's row.
-- They are separate so that each sees what was committed while an earlier one waited. All ask hpo.moment(), the
-- transaction's begin, so that they agree. The trial taken is left in hpo.calls: a repetition finds it there and takes
-- nothing more.

-- name: take_lock
-- Lock the study's row. What follows may end trials.
-- prepared: study int
SELECT set_config('hpo.lease', 'any', true) FROM ({lock_study_row}) s

-- name: take_touch
-- Note that the worker lives.
-- prepared: worker text
{touch_worker}

-- name: take_tick
-- Let the study's clock go on, so that elapsed_s is exact as of this moment.
-- prepared: study int
UPDATE hpo.terms SET elapsed_s = {elapsed}, clock_at = hpo.clock()
WHERE study_id = %(study)s AND timeout_s IS NOT NULL AND status IN ('open', 'exhausted')

-- name: take_end_foreign
-- End the leases of trials that somebody else ended: a plain script, a dashboard.
-- prepared: study int
UPDATE hpo.leases l SET ended_at = hpo.clock() FROM trials t
WHERE l.study_id = %(study)s AND l.ended_at IS NULL AND l.trial_id = t.trial_id AND t.state <> 'RUNNING'

-- name: take_lapse
-- Take for dead the holders that were not heard of in time. Times in which the caller could not reach the database, of
-- away_s seconds until back_s seconds ago, are added to everybody's. Its own threads, who hold `held`, live as it does.
-- prepared: study int, away_s float8[], back_s float8[], held int[]
UPDATE hpo.leases l SET {lapse} FROM hpo.terms s
WHERE l.study_id = %(study)s AND s.study_id = l.study_id AND l.ended_at IS NULL AND NOT {free} AND l.trial_id <> ALL(%(held)s)
AND {waited_for} + coalesce((SELECT max(away) FROM unnest(%(away_s)s, %(back_s)s) o (away, back)
    WHERE back < s.lease_s), 0) * interval '1 s' <= hpo.moment()

-- fragment: spent
-- Whether the trial was lost once too often.
(NOT l.released AND l.lost_attempt IS NOT DISTINCT FROM l.attempt AND l.lost_progress IS NOT NULL
    AND l.lost >= s.max_attempts)

-- name: take_fail_spent
-- Fail the trials that were lost once too often, and say why. Nobody adopts them any more, but a holder that may still
-- live has the time of its lease once more to come back.
-- prepared: study int
WITH spent AS (UPDATE hpo.leases l SET ended_at = hpo.clock() FROM hpo.terms s
    WHERE l.study_id = %(study)s AND s.study_id = l.study_id AND l.ended_at IS NULL AND {spent}
    AND (l.expires_at = '-infinity' OR {waited_for} + {lease_time} <= hpo.moment())
    RETURNING l.trial_id, l.worker, l.lost, l.epoch),
failed AS (UPDATE trials t SET state = 'FAIL', datetime_complete = {utc_now} FROM spent s
    WHERE t.trial_id = s.trial_id AND t.state = 'RUNNING' RETURNING t.trial_id)
INSERT INTO trial_user_attributes (trial_id, key, value_json)
SELECT trial_id, 'failure', to_json('given up after ' || lost || ' attempts: each time its worker went silent or '
    'made no progress, the last time ' || worker || coalesce(' after epoch ' || epoch, '')
    || coalesce('; a worker said: ' || (SELECT value_json::json #>> '{}' FROM trial_user_attributes a
        WHERE a.trial_id = s.trial_id AND key = 'worker_fault'), ''))
FROM spent s JOIN failed USING (trial_id)
ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json

-- fragment: judged
-- Whether the caller has judged by the patience that the study has and by all of its trials that have ended, or need
-- not; in a study in order by those that the next trial sees.
(s.patience IS NULL OR coalesce(s.patience = %(patience)s AND s.patient_from = %(since)s
    AND CASE WHEN {parallel} IS NOT NULL THEN %(next)s = {next_to_start}
        ELSE %(finished)s = (SELECT count(*) FROM trials j WHERE j.study_id = s.study_id AND j.state IN ('COMPLETE', 'PRUNED'))
        END
    AND %(dropped)s = ARRAY(SELECT trial_id FROM hpo.dropped j WHERE j.study_id = s.study_id ORDER BY trial_id), false))

-- fragment: may_start
-- Whether budget and time allow another trial.
(s.status = 'open' AND s.started < s.budget AND NOT coalesce(s.elapsed_s >= s.timeout_s, false))

-- fragment: parallel
-- How many trials are at work at once in a study whose trials start in order; NULL: they start as workers are free.
(s.config #>> '{config,study,parallel}')::int

-- fragment: next_to_start
-- The number of the trial that starts next: the first that waits, else a new one.
coalesce((SELECT min(n.number) FROM trials n WHERE n.study_id = s.study_id AND n.state = 'WAITING'),
    (SELECT max(n.number) + 1 FROM trials n WHERE n.study_id = s.study_id), 0)

-- fragment: in_order
-- Whether what the next trial goes by is there: all trials that are `parallel` numbers before it have ended, and the
-- parameters of those between were drawn, as hpo/study/view.py has it.
({parallel} IS NULL OR NOT EXISTS (SELECT FROM hpo.leases o JOIN trials p USING (trial_id)
    WHERE o.study_id = s.study_id AND o.ended_at IS NULL AND p.state = 'RUNNING'
    AND (p.number <= {next_to_start} - {parallel} OR NOT EXISTS (SELECT FROM trial_system_attributes v
        WHERE v.trial_id = p.trial_id AND v.key = 'hpo:view'))))

-- fragment: cut
-- Whether the study's time is spent and cuts trials off: those of a study in order go on only where it gets more.
({parallel} IS NOT NULL AND {out_of_time})

-- name: take_stand_still
-- End a study whose patience is at its end: nothing new is started. Trials that wait come before, and those that began
-- before the ones that brought nothing, up to `last`.
-- prepared: study int, patience int, since int, finished int, dropped int[], next int, standstill jsonb, last int
UPDATE hpo.terms s SET status = 'exhausted', standstill = %(standstill)s
WHERE study_id = %(study)s AND %(standstill)s IS NOT NULL AND {may_start} AND {in_order} AND s.patience IS NOT NULL
AND {judged}
AND NOT EXISTS (SELECT FROM trials t WHERE t.study_id = s.study_id AND t.state = 'WAITING')
AND NOT EXISTS (SELECT FROM hpo.leases l JOIN trials t USING (trial_id)
    WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING' AND t.number <= %(last)s)

-- name: take_adopt
-- Adopt the first of the trials that are free, also after the study's time: it is then ended with what it has, unless the
-- study's trials are in order, which are cut off. None that another thread of the caller's process still holds: its
-- writes would pass under the new lease.
-- prepared: study int, worker text, device text, held int[], standing bool, aside int[], client uuid, call bigint
WITH adopted AS (UPDATE hpo.leases l SET attempt = attempt + 1, released = false, worker = %(worker)s,
        device = %(device)s, progress = 0, progress_at = hpo.clock(), epoch = checkpoint_epoch, metric = NULL,
        began_epoch = checkpoint_epoch, renewed_at = hpo.clock(), expires_at = hpo.clock() + {lease_time}
    FROM hpo.terms s
    WHERE s.study_id = %(study)s AND s.status IN ('open', 'exhausted') AND NOT {cut} AND NOT {capped} AND {its_turn}
    AND NOT EXISTS (SELECT FROM hpo.calls WHERE {this_call})
    AND trial_id = (SELECT l.trial_id FROM hpo.leases l JOIN trials t USING (trial_id)
        WHERE l.study_id = %(study)s AND l.ended_at IS NULL AND {free} AND NOT {spent} AND l.trial_id <> ALL(%(held)s)
        ORDER BY t.number LIMIT 1 FOR UPDATE OF l)
    RETURNING trial_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM adopted {claim}

-- name: take_forget_reports
-- Remove the adopted trial's reports of epochs after its checkpoint, which are trained again.
-- prepared: client uuid, call bigint
DELETE FROM trial_intermediate_values i USING hpo.calls c, hpo.leases l
WHERE {this_call} AND l.trial_id = c.result AND l.attempt > 1 AND i.trial_id = l.trial_id
AND i.step > coalesce(l.checkpoint_epoch, -1)

-- name: take_start
-- Where nothing was adopted, and budget, time, patience and the trials' order allow it, start a waiting or a new trial.
-- prepared: study int, worker text, device text, held int[], standing bool, aside int[], client uuid, call bigint,
--     patience int, since int, finished int, dropped int[], next int
WITH counted AS (UPDATE hpo.terms s SET started = started + 1,
        taken_at = CASE WHEN %(standing)s THEN hpo.clock() ELSE taken_at END
    WHERE study_id = %(study)s AND {may_start} AND {in_order} AND {judged}
    AND NOT {capped} AND {its_turn} AND NOT EXISTS (SELECT FROM hpo.calls WHERE {this_call}) RETURNING lease_s),
popped AS (UPDATE trials SET state = 'RUNNING', datetime_start = {utc_now}
    WHERE EXISTS (TABLE counted) AND trial_id = (SELECT trial_id FROM trials
        WHERE study_id = %(study)s AND state = 'WAITING' ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING trial_id),
made AS (INSERT INTO trials (study_id, number, state, datetime_start)
    SELECT %(study)s, {next_number}, 'RUNNING', {utc_now}
    FROM counted WHERE NOT EXISTS (TABLE popped) RETURNING trial_id),
taken AS (TABLE popped UNION ALL TABLE made),
granted AS (INSERT INTO hpo.leases (trial_id, study_id, worker, device, renewed_at, expires_at, progress_at)
    SELECT trial_id, %(study)s, %(worker)s, %(device)s, hpo.clock(), hpo.clock() + {lease_time}, hpo.clock()
    FROM taken, counted s)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM taken {claim}

-- name: take_result
-- The lease that was taken, if any, and what is left of the study. In a study that was stopped only what is held is in
-- flight: the rest is kept, as in one in order whose time is spent. In one that is open something is to come as long as it
-- has a trial to start. With it the study's patience, whether the caller has to judge anew before it starts one, and
-- whether one would start if those before it had come as far as it needs.
-- prepared: study int, client uuid, call bigint, patience int, since int, finished int, dropped int[], next int
SELECT l.study_id, l.trial_id, t.number, l.worker, l.attempt, l.attempt > 1, l.checkpoint_key, l.checkpoint_epoch,
    s.lease_s, s.store_key, l.lost, {revision}, s.status, coalesce(elapsed_s >= timeout_s, false), started >= budget,
    s.standstill IS NOT NULL, EXISTS (SELECT FROM hpo.leases l WHERE l.study_id = %(study)s AND l.ended_at IS NULL
        AND (s.status IN ('open', 'exhausted') AND NOT {cut} OR NOT {free} AND {waited_for} > hpo.moment()))
    OR {may_start}, s.patience, s.patient_from, {may_start} AND {in_order} AND NOT {judged},
    {may_start} AND NOT {capped} AND NOT {in_order}
FROM hpo.terms s LEFT JOIN hpo.calls c ON {this_call} LEFT JOIN hpo.leases l ON l.trial_id = c.result
    LEFT JOIN trials t ON t.trial_id = l.trial_id
WHERE s.study_id = %(study)s

-- name: lapse_workers
-- Take for dead what these workers hold, and whom they promote for: their processes are gone. Where counted is false
-- their machine went down, which is no trial's fault.
-- types: workers text[], counted bool
WITH lapsed AS (UPDATE hpo.leases l SET {lapse}, expires_at = '-infinity' FROM hpo.terms s
    WHERE %(counted)s AND s.study_id = l.study_id AND l.worker = ANY(%(workers)s) AND l.ended_at IS NULL AND NOT {free}),
released AS (UPDATE hpo.leases SET released = true
    WHERE NOT %(counted)s AND worker = ANY(%(workers)s) AND ended_at IS NULL),
resigned AS (UPDATE hpo.terms SET promoter = NULL, promoter_expires_at = NULL
    WHERE promoter = ANY(%(workers)s) AND status IN ('open', 'exhausted'))
UPDATE hpo.workers SET stopped_at = seen_at WHERE worker = ANY(%(workers)s) AND stopped_at IS NULL

-- name: workers_of_host
-- The workers of a host that have not said that they ended, but for one: with the time since they were last heard of.
-- types: host text, worker text
SELECT worker, machine, pid, process_start, extract(epoch FROM hpo.clock() - seen_at)::float8 FROM hpo.workers
WHERE host = %(host)s AND worker <> %(worker)s AND stopped_at IS NULL AND machine IS NOT NULL AND pid IS NOT NULL

-- name: renew
-- Renew a worker's leases with their progress, and let their studies' clocks go on. One without progress for stall_s is
-- left to run out. A holder that was taken for dead lives after all: that loss does not count.
-- prepared: worker text, trials int[], attempts int[], progress bigint[], epochs int[], metrics float8[]
WITH reported AS (SELECT * FROM unnest(%(trials)s::int[], %(attempts)s::int[], %(progress)s::bigint[],
    %(epochs)s::int[], %(metrics)s::float8[]) AS b (trial_id, attempt, progress, epoch, metric)),
seen AS ({touch_worker}),
ticked AS (UPDATE hpo.terms SET elapsed_s = {elapsed}, clock_at = hpo.clock() WHERE study_id IN (
    SELECT study_id FROM hpo.terms JOIN hpo.leases USING (study_id) JOIN reported USING (trial_id)
    WHERE timeout_s IS NOT NULL AND status IN ('open', 'exhausted') FOR NO KEY UPDATE OF terms SKIP LOCKED)),
renewed AS (UPDATE hpo.leases l SET epoch = b.epoch, metric = b.metric, progress = b.progress, renewed_at = hpo.clock(),
        progress_at = CASE WHEN b.progress <> l.progress THEN hpo.clock() ELSE l.progress_at END,
        expires_at = hpo.clock() + {lease_time}, {forgive}
    FROM reported b, hpo.terms s
    WHERE l.trial_id = b.trial_id AND l.attempt = b.attempt AND l.worker = %(worker)s AND s.study_id = l.study_id
    AND l.ended_at IS NULL AND NOT l.released
    AND (b.progress <> l.progress OR l.progress_at > hpo.clock() - s.stall_s * interval '1 s')),
forgiven AS (UPDATE hpo.leases l SET lost_attempt = NULL, lost_progress = NULL, lost = l.lost - 1 FROM reported b
    WHERE l.trial_id = b.trial_id AND l.lost_attempt = b.attempt AND l.attempt > b.attempt
    AND b.progress > l.lost_progress AND l.ended_at IS NULL)
SELECT b.trial_id, b.attempt, l.study_id, s.status, {out_of_time},
    coalesce(l.attempt = b.attempt AND (l.ended_at IS NOT NULL OR l.worker = %(worker)s AND NOT l.released), false)
FROM reported b LEFT JOIN hpo.leases l USING (trial_id) LEFT JOIN hpo.terms s USING (study_id)

-- name: checkpoint
-- Name the artifact with the trial's state after an epoch, and keep the one before. Returns the key of the one before
-- that, which is kept no longer; a repetition returns none.
-- prepared: trial int, attempt int, worker text, key text, epoch int, client uuid, call bigint
WITH earlier AS (SELECT FROM hpo.calls WHERE {this_call}),
old AS (SELECT trial_id, checkpoint_key IS NOT DISTINCT FROM %(key)s AS same, checkpoint_key, checkpoint_epoch,
    replaced_key, replaced_epoch FROM hpo.leases WHERE {held} AND NOT EXISTS (TABLE earlier) FOR UPDATE),
named AS (UPDATE hpo.leases l SET checkpoint_key = %(key)s, checkpoint_epoch = %(epoch)s,
    replaced_key = CASE WHEN o.same THEN o.replaced_key ELSE o.checkpoint_key END,
    replaced_epoch = CASE WHEN o.same THEN o.replaced_epoch ELSE o.checkpoint_epoch END
    FROM old o WHERE l.trial_id = o.trial_id
    RETURNING l.trial_id, CASE WHEN NOT o.same THEN o.replaced_key END AS dropped_key),
claimed AS (INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM named {claim})
SELECT dropped_key FROM named UNION ALL SELECT NULL FROM earlier

-- Dropping a checkpoint: these statements go together in one round trip and transaction, and a repetition changes
-- nothing more. A trial's progress is still counted from the checkpoint that its attempt began with.

-- name: drop_checkpoint
-- Go back from a checkpoint that cannot be used to the one before, or to none.
-- types: trial int, attempt int, worker text, key text
UPDATE hpo.leases SET checkpoint_key = replaced_key, checkpoint_epoch = replaced_epoch, replaced_key = NULL,
    replaced_epoch = NULL, epoch = replaced_epoch, metric = NULL
WHERE {held} AND checkpoint_key = %(key)s

-- name: drop_reports
-- Remove the trial's reports of epochs after its checkpoint, which are trained again.
-- types: trial int, attempt int, worker text
DELETE FROM trial_intermediate_values i
USING (SELECT trial_id AS held_id, checkpoint_epoch FROM hpo.leases WHERE {held}) l
WHERE i.trial_id = l.held_id AND i.step > coalesce(l.checkpoint_epoch, -1)

-- name: last_checkpoint
-- The trial's checkpoint and its epoch.
-- types: trial int, attempt int, worker text
SELECT checkpoint_key, checkpoint_epoch FROM hpo.leases WHERE {held}

-- name: spent_checkpoints
-- The checkpoints of ended trials that nobody has reported as deleted.
-- prepared: study int
SELECT key FROM hpo.leases, unnest(ARRAY[checkpoint_key, replaced_key]) AS key
WHERE study_id = %(study)s AND ended_at IS NOT NULL AND key IS NOT NULL

-- name: kept_checkpoints
-- The checkpoints of trials that have not ended.
-- types: study int
SELECT key FROM hpo.leases, unnest(ARRAY[checkpoint_key, replaced_key]) AS key
WHERE study_id = %(study)s AND ended_at IS NULL AND key IS NOT NULL

-- name: forget_checkpoints
-- Forget checkpoints of ended trials that have been deleted.
-- types: study int, keys text[]
UPDATE hpo.leases SET checkpoint_key = CASE WHEN checkpoint_key <> ALL(%(keys)s) THEN checkpoint_key END,
    replaced_key = CASE WHEN replaced_key <> ALL(%(keys)s) THEN replaced_key END
WHERE study_id = %(study)s AND ended_at IS NOT NULL
AND (checkpoint_key = ANY(%(keys)s) OR replaced_key = ANY(%(keys)s))

-- name: release
-- Give a trial back at once. A holder that was taken for dead lives after all.
-- prepared: trial int, attempt int, worker text
UPDATE hpo.leases l SET released = true, {forgive} WHERE {held}

-- name: lapse_trial
-- Take a trial's holder for dead at its own word, and keep with the trial what it says.
-- types: trial int, attempt int, worker text, reason text
WITH mine AS (SELECT trial_id FROM hpo.leases WHERE {held} FOR UPDATE),
lapsed AS (UPDATE hpo.leases l SET {lapse}, expires_at = '-infinity' FROM mine m
    WHERE l.trial_id = m.trial_id AND NOT {free})
INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT trial_id, 'worker_fault', to_json(%(reason)s::text)
FROM mine ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json

-- name: offers_trial
-- Whether a study has a trial to take: one that is free, or one to start.
-- types: study int, held int[]
SELECT {offers} FROM hpo.terms s WHERE study_id = %(study)s

-- name: holders
-- Who holds each of these trials, or held it last: its worker, that one's device, and the attempt.
-- types: trials int[]
SELECT l.trial_id, l.worker, coalesce(w.device, l.device), l.attempt
FROM hpo.leases l LEFT JOIN hpo.workers w USING (worker) WHERE l.trial_id = ANY(%(trials)s)

-- name: trials_advanced_by
-- How many trials a worker has trained to their end, or took last and brought further, by their checkpoints.
-- types: worker text
SELECT count(*) FROM hpo.leases l JOIN trials t USING (trial_id)
WHERE l.worker = %(worker)s AND CASE WHEN l.ended_at IS NULL THEN {further} ELSE t.state IN ('COMPLETE', 'PRUNED') END

-- name: acquire_promotion
-- Take or renew the lease to promote: nothing more is started and nothing is in flight.
-- types: study int, worker text
UPDATE hpo.terms s SET promoter = %(worker)s, promoter_expires_at = hpo.clock() + {lease_time}
WHERE study_id = %(study)s AND (promoter IS NULL OR promoter = %(worker)s OR {promoter_silent}) AND {trained}
RETURNING lease_s

-- fragment: trained
-- Whether nothing is left of the study but to promote its best trial: nothing more is started, nothing is in flight. What
-- the study's time has cut off is kept.
(s.status IN ('open', 'exhausted') AND s.promoted_version IS NULL
    AND (s.status = 'exhausted' OR s.started >= s.budget OR {out_of_time})
    AND NOT EXISTS (SELECT FROM hpo.leases l JOIN trials t USING (trial_id)
        WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING' AND (NOT {cut} OR {alive})))

-- fragment: promoter_silent
-- Whether the promoter was not heard of for the time of its lease, or since the server's start.
greatest(promoter_expires_at, CASE WHEN promoter_expires_at - {lease_time} < hpo.server_started()
    THEN hpo.server_started() + {lease_time} END) <= hpo.clock()

-- name: release_promotions
-- Leave what a worker has begun to promote to the next one.
-- types: worker text
UPDATE hpo.terms SET promoter = NULL, promoter_expires_at = NULL
WHERE promoter = %(worker)s AND status IN ('open', 'exhausted') RETURNING study_id

-- name: finish_promotion
-- Record the promoted version, and with it that the study is finished; no row where the promotion passed to another
-- worker, or the version's trial was dropped meanwhile. It goes together with lock_study, as drop_trials does.
-- types: study int, worker text, version int
UPDATE hpo.terms s SET promoted_version = %(version)s, status = 'finished', promoter_expires_at = NULL
WHERE study_id = %(study)s AND promoter = %(worker)s AND
    (status = 'finished' AND promoted_version IS NOT DISTINCT FROM %(version)s
    OR promoter_expires_at IS NOT NULL AND NOT EXISTS (SELECT FROM {versions_of_dropped} AND m.version = %(version)s))
RETURNING study_id

-- fragment: versions_of_dropped
-- The study's versions whose trials were dropped.
hpo.models m JOIN studies n ON n.study_id = m.study_id AND n.study_name = m.name
    JOIN trials t ON t.study_id = m.study_id AND t.number = m.trial_number JOIN hpo.dropped d ON d.trial_id = t.trial_id
    WHERE m.study_id = s.study_id

-- name: promote_again
-- Let a study that is over have brought that version, where its own is of a trial that was dropped, or it has none.
-- types: study int, version int
UPDATE hpo.terms s SET promoted_version = %(version)s
WHERE study_id = %(study)s AND status = 'finished' AND (promoted_version IS NULL
    OR EXISTS (SELECT FROM {versions_of_dropped} AND m.version = s.promoted_version))
