-- The terms of a study, its workers, and its state for displays.

-- fragment: terms
SELECT study_id, study_name, config, budget, started, timeout_s, opened_at, {elapsed}, lease_s, stall_s, max_attempts,
    status, promoter, promoter_expires_at, promoted_version, {out_of_time}, resolution, store_key, owner,
    priority, max_workers, finalists, repeats, patience, standstill
FROM hpo.terms JOIN studies USING (study_id)

-- name: open_study
-- Store the terms of a study, unless it has some.
-- types: study int, config jsonb, budget int, timeout_s float8, lease_s float8, stall_s float8, max_attempts int,
--     resolution float8, priority int, max_workers int, patience int, owner text, finalists int,
--     repeats int, finals_of int
INSERT INTO hpo.terms (study_id, config, budget, timeout_s, lease_s, stall_s, max_attempts, resolution, priority,
    max_workers, patience, owner, finalists, repeats, finals_of, store_key)
SELECT study_id, %(config)s, %(budget)s, %(timeout_s)s, %(lease_s)s, %(stall_s)s, %(max_attempts)s, %(resolution)s,
    %(priority)s, %(max_workers)s, %(patience)s, %(owner)s, %(finalists)s, %(repeats)s, %(finals_of)s,
    study_id || '_' || left(replace(gen_random_uuid()::text, '-', ''), 12)
FROM studies WHERE study_id = %(study)s ON CONFLICT DO NOTHING

-- name: study_terms
-- The terms and state of one study.
-- prepared: study int
{terms} WHERE study_id = %(study)s

-- name: study_ids
-- The studies with terms, the newest first, but for finals: they are shown with their study.
-- types: most int, skip int
SELECT study_id FROM hpo.terms WHERE finals_of IS NULL ORDER BY study_id DESC LIMIT %(most)s OFFSET %(skip)s

-- name: reopen_study
-- Go on with a study that was stopped, under a new budget: of trials, never below those that have begun, of time and of
-- patience. One that is over, and is given more of what it had no more of, is open again.
-- types: study int, trials int, timed bool, timeout_s float8, patient bool, patience int
UPDATE hpo.terms s SET budget = n.new_budget, timeout_s = n.new_timeout_s, patience = n.new_patience,
    elapsed_s = CASE WHEN s.timeout_s IS NULL THEN 0 ELSE elapsed_s END, -- time is counted where there is a limit
    status = CASE WHEN n.goes_on THEN 'open' ELSE status END,
    standstill = CASE WHEN NOT n.goes_on THEN standstill END,
    promoter = CASE WHEN NOT n.goes_on THEN promoter END,
    promoter_expires_at = CASE WHEN NOT n.goes_on THEN promoter_expires_at END,
    promoted_version = CASE WHEN NOT n.goes_on THEN promoted_version END
FROM (SELECT study_id, new_budget, new_timeout_s, new_patience, status = 'stopped'
        OR CASE WHEN standstill IS NOT NULL THEN coalesce((standstill ->> 'trials')::int < new_patience, true)
            ELSE new_budget > budget OR status = 'finished' AND {out_of_time} AND (started < budget
                    OR EXISTS (SELECT FROM hpo.leases l WHERE l.study_id = o.study_id AND l.ended_at IS NULL))
                AND NOT coalesce({elapsed} >= new_timeout_s, false) END AS goes_on
    FROM hpo.terms o CROSS JOIN LATERAL (SELECT greatest(coalesce(%(trials)s, o.budget), o.started) AS new_budget,
        CASE WHEN %(timed)s THEN %(timeout_s)s ELSE o.timeout_s END AS new_timeout_s,
        CASE WHEN %(patient)s THEN %(patience)s ELSE o.patience END AS new_patience) m
    WHERE study_id = %(study)s FOR NO KEY UPDATE OF o) n
WHERE s.study_id = n.study_id

-- name: want_finals
-- How many configurations are in the study's finals, and how often each is trained. One that is finished and wants others
-- than it had is promoted again, after them.
-- types: study int, finalists int, repeats int
UPDATE hpo.terms s SET finalists = %(finalists)s, repeats = %(repeats)s,
    status = CASE WHEN n.again THEN 'exhausted' ELSE status END,
    promoter = CASE WHEN NOT n.again THEN promoter END,
    promoter_expires_at = CASE WHEN NOT n.again THEN promoter_expires_at END,
    promoted_version = CASE WHEN NOT n.again THEN promoted_version END
FROM (SELECT study_id, status = 'finished' AND %(finalists)s > 0
        AND (finalists, repeats) IS DISTINCT FROM (%(finalists)s, %(repeats)s) AS again
    FROM hpo.terms WHERE study_id = %(study)s FOR NO KEY UPDATE) n
WHERE s.study_id = n.study_id

-- name: set_promotion
-- What is promoted and how, the sections [limits] and [promote] of the plan, which the study's workers open anew. One
-- that is finished is promoted again.
-- types: study int, limits jsonb, promote jsonb
UPDATE hpo.terms s SET config = jsonb_set(jsonb_set(jsonb_set(jsonb_set(jsonb_set(s.config,
        '{config,limits}', %(limits)s), '{written,limits}', %(limits)s),
        '{config,promote}', %(promote)s), '{written,promote}', %(promote)s),
        ARRAY['revision'], to_jsonb({revision} + 1)),
    status = CASE WHEN status = 'finished' THEN 'exhausted' ELSE status END,
    promoter = CASE WHEN status <> 'finished' THEN promoter END,
    promoter_expires_at = CASE WHEN status <> 'finished' THEN promoter_expires_at END,
    promoted_version = CASE WHEN status <> 'finished' THEN promoted_version END
WHERE study_id = %(study)s

-- fragment: within_limits
-- Whether the complete trial is within the limits of its study: the rule of hpo/study/limits.py.
NOT EXISTS (SELECT FROM jsonb_each_text(s.config #> '{config,limits}') AS x (name, most)
    WHERE NOT coalesce((SELECT CASE WHEN value_json ~ '^\d+(\.\d+)?(e[+-]?\d+)?$' AND length(value_json) < 300
                THEN value_json::float8 END
            FROM trial_user_attributes a WHERE a.trial_id = c.trial_id AND a.key = x.name) <= most::float8, false))

-- name: reopen_finals
-- Go on with the finals of a study, where they were stopped with it.
-- types: study int
UPDATE hpo.terms SET status = 'open' WHERE finals_of = %(study)s AND status = 'stopped'

-- name: extend_finals
-- Give finals the plan after the one of that revision, which has more trainings, and their time.
-- types: study int, revision int, config jsonb, budget int, timeout_s float8
UPDATE hpo.terms s SET config = %(config)s, budget = %(budget)s, timeout_s = %(timeout_s)s, status = 'open'
WHERE study_id = %(study)s AND {revision} = %(revision)s

-- name: finals
-- The finals of a study: their id, their name, and whether nothing is left of them to train.
-- types: study int
SELECT s.study_id, study_name, s.status = 'finished' OR {trained} FROM hpo.terms s JOIN studies USING (study_id)
WHERE finals_of = %(study)s

-- name: finish_finals
-- End the finals of a study that is finished.
-- types: study int
UPDATE hpo.terms SET status = 'finished' WHERE finals_of = %(study)s AND status IN ('open', 'exhausted')
AND EXISTS (SELECT FROM hpo.terms WHERE study_id = %(study)s AND status = 'finished')

-- name: set_status
-- Change the status of a study and of its finals where they have one of the earlier ones.
-- types: study int, status text, earlier text[]
UPDATE hpo.terms SET status = %(status)s
WHERE (study_id = %(study)s OR finals_of = %(study)s) AND status = ANY(%(earlier)s)

-- name: forget_old_calls
-- Forget the calls of clients that are gone for a day.
DELETE FROM hpo.calls WHERE called_at < hpo.clock() - interval '1 day'

-- name: forget_old_workers
-- Forget the workers that are gone for thirty days.
DELETE FROM hpo.workers WHERE seen_at < hpo.clock() - interval '30 days'

-- name: register_worker
-- Make a worker known to displays.
-- types: worker text, study int, host text, pid int, device text, log text, machine text, process_start bigint
INSERT INTO hpo.workers (worker, study_id, host, pid, device, log, machine, process_start, started_at, seen_at)
VALUES (%(worker)s, %(study)s, %(host)s, %(pid)s, %(device)s, %(log)s, %(machine)s, %(process_start)s, hpo.clock(),
    hpo.clock())
ON CONFLICT (worker) DO UPDATE SET study_id = excluded.study_id, host = excluded.host, pid = excluded.pid,
    device = excluded.device, log = excluded.log, machine = excluded.machine, process_start = excluded.process_start,
    started_at = excluded.started_at, seen_at = excluded.seen_at, stopped_at = NULL

-- name: retire_worker
-- Note that a worker has ended.
-- types: worker text
UPDATE hpo.workers SET stopped_at = hpo.clock(), seen_at = hpo.clock() WHERE worker = %(worker)s

-- name: workers
-- The workers that were started for the study or hold one of its trials, oldest first.
-- types: study int
SELECT worker, host, pid, device, log, stopped_at IS NULL AND seen_at > hpo.clock() - lease_s * interval '1 s'
FROM hpo.workers w JOIN hpo.terms s ON s.study_id = %(study)s
WHERE w.study_id = s.study_id OR EXISTS (
    SELECT FROM hpo.leases l WHERE l.study_id = s.study_id AND l.worker = w.worker)
ORDER BY started_at, worker

-- name: snapshots
-- Studies at one moment, the oldest first: terms, trials by state, the best one, those in flight, workers and rate; of a
-- study in order how long its workers have waited and trained.
-- types: studies int[], recent int
SELECT s.study_id, n.study_name, s.status, s.budget, s.started, CASE WHEN timeout_s IS NOT NULL
        THEN greatest(0, timeout_s - {elapsed}) END,
    s.promoted_version,
    (SELECT json_object_agg(state, n) FROM (SELECT state, count(*) AS n FROM trials t
        WHERE t.study_id = s.study_id GROUP BY state) c),
    (WITH costs AS (SELECT t.trial_id, t.number, v.value, coalesce(nullif(v.value, 'NaN')
                * CASE d.direction WHEN 'MAXIMIZE' THEN -1 ELSE 1 END, 'Infinity') AS cost
            FROM trials t CROSS JOIN LATERAL (SELECT CASE value_type WHEN 'FINITE' THEN value
                    WHEN 'INF_POS' THEN 'Infinity' WHEN 'INF_NEG' THEN '-Infinity' ELSE 'NaN' END AS value
                FROM trial_values v WHERE v.trial_id = t.trial_id AND v.objective = 0) v
            WHERE t.study_id = s.study_id AND t.state = 'COMPLETE'
            AND NOT EXISTS (SELECT FROM hpo.dropped x WHERE x.trial_id = t.trial_id)),
        first AS (SELECT number, value, cost FROM (SELECT * FROM costs ORDER BY cost, number OFFSET 0) c
            WHERE {trained_by_us} AND {within_limits} LIMIT 1)
        SELECT json_build_array(c.number, c.value, CASE WHEN f.cost < c.cost THEN f.number END, f.value)
        FROM (SELECT c.* FROM costs c JOIN first f ON c.cost <= f.cost + s.resolution OFFSET 0) c, first f
        WHERE {trained_by_us} AND {within_limits}
        ORDER BY coalesce((SELECT nullif(CASE WHEN value_json ~ '^-?(\d+(\.\d+)?(e[+-]?\d+)?|Infinity)$'
                    AND length(value_json) < 300 THEN value_json::float8 END, 'NaN')
                FROM trial_user_attributes a WHERE a.trial_id = c.trial_id AND a.key = 'log_loss'), 'Infinity'),
            c.cost, c.number
        LIMIT 1), -- the rule of hpo/study/ranking.py
    (SELECT json_agg(json_build_array(t.number, l.worker, w.host, coalesce(l.device, w.device), l.attempt, l.epoch,
            CASE WHEN l.metric NOT IN ('NaN', 'Infinity', '-Infinity') THEN l.metric END,
            NOT {free} AND {waited_for} > hpo.clock()) ORDER BY t.number)
        FROM hpo.leases l JOIN trials t USING (trial_id) LEFT JOIN hpo.workers w USING (worker)
        WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING'),
    (SELECT json_agg(json_build_array(host, device, n) ORDER BY host, device) FROM (SELECT host, device, count(*) AS n
        FROM hpo.workers w WHERE (w.study_id = s.study_id OR w.study_id IS NULL) AND w.stopped_at IS NULL
        AND w.seen_at > hpo.clock() - s.lease_s * interval '1 s' GROUP BY host, device) p),
    least(r.n, %(recent)s) * 3600.0::float8
        / nullif(extract(epoch FROM r.ended - CASE WHEN r.n > %(recent)s THEN r.since ELSE e.started END)::float8, 0),
    e.started, r.ended, s.config #>> '{config,study,metric}', s.owner, s.priority, s.max_workers,
    (SELECT json_agg(json_build_array(t.number, d.reason, d.dropped_by, d.dropped_at) ORDER BY t.number)
        FROM hpo.dropped d JOIN trials t USING (trial_id) WHERE d.study_id = s.study_id),
    (SELECT t.number FROM {versions_of_dropped} AND m.version = s.promoted_version), s.patience, s.standstill,
    (SELECT json_build_array(o.study_name, (SELECT count(*) FROM hpo.leases l
            WHERE l.study_id = f.study_id AND l.ended_at IS NOT NULL), f.budget)
        FROM hpo.terms f JOIN studies o USING (study_id) WHERE f.finals_of = s.study_id),
    CASE WHEN s.config #> '{config,limits}' <> '{}' THEN (SELECT json_build_array(s.config #> '{config,limits}', count(*))
        FROM trials c WHERE c.study_id = s.study_id AND c.state IN ('COMPLETE', 'PRUNED') AND {trained_by_us}
        AND NOT EXISTS (SELECT FROM hpo.dropped x WHERE x.trial_id = c.trial_id) AND NOT {within_limits}) END,
    CASE WHEN {parallel} IS NOT NULL THEN (SELECT json_build_array({parallel},
            coalesce(sum((SELECT CASE WHEN value_json ~ '^\d+(\.\d+)?$' AND length(value_json) < 30
                    THEN value_json::float8 END
                FROM trial_user_attributes a WHERE a.trial_id = t.trial_id AND a.key = 'waited_s')), 0),
            coalesce(sum(extract(epoch FROM t.datetime_complete - t.datetime_start)), 0)::float8)
        FROM trials t WHERE t.study_id = s.study_id) END
FROM hpo.terms s JOIN studies n USING (study_id)
    JOIN study_directions d ON d.study_id = s.study_id AND d.objective = 0
    CROSS JOIN LATERAL (SELECT min(t.datetime_start AT TIME ZONE 'UTC') AS started
        FROM hpo.leases l JOIN trials t ON t.trial_id = l.trial_id AND t.study_id = l.study_id
        WHERE l.study_id = s.study_id AND l.ended_at IS NOT NULL) e
    CROSS JOIN LATERAL (SELECT count(*) AS n, min(ended_at) AS since, max(ended_at) AS ended
        FROM (SELECT ended_at FROM hpo.leases l WHERE l.study_id = s.study_id AND ended_at IS NOT NULL
            ORDER BY ended_at DESC LIMIT %(recent)s + 1) l) r
WHERE s.study_id = ANY(%(studies)s)
ORDER BY s.study_id

-- fragment: trained_by_us
-- Whether one of our workers has trained the trial: neither copied nor another program's.
EXISTS (SELECT FROM trial_user_attributes a WHERE a.trial_id = c.trial_id AND a.key = 'seed')
