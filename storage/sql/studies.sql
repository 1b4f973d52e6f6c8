-- The terms of a study, its workers, and its state for displays.

-- fragment: terms
SELECT study_id, study_name, config, budget, started, timeout_s, opened_at, deadline, lease_s, stall_s, max_attempts,
    status, promoter, promoter_expires_at, promoted_version, {out_of_time}
FROM hpo.terms JOIN studies USING (study_id)

-- name: open_study
-- Store the terms of a study, unless it has some.
-- types: study int, config jsonb, budget int, timeout_s float8, lease_s float8, stall_s float8, max_attempts int
INSERT INTO hpo.terms (study_id, config, budget, timeout_s, deadline, lease_s, stall_s, max_attempts)
SELECT study_id, %(config)s, %(budget)s, %(timeout_s)s, now() + %(timeout_s)s * interval '1 s', %(lease_s)s,
    %(stall_s)s, %(max_attempts)s
FROM studies WHERE study_id = %(study)s ON CONFLICT DO NOTHING

-- name: study_terms
-- The terms and state of one study.
-- types: study int
{terms} WHERE study_id = %(study)s

-- name: all_study_terms
-- The terms and state of every study, oldest first.
{terms} ORDER BY study_id

-- name: reopen_study
-- Go on with a study that was stopped, or that more trials are given to.
-- types: study int, trials int
UPDATE hpo.terms SET budget = greatest(budget, %(trials)s), status = 'open', promoter = NULL,
    promoter_expires_at = NULL, promoted_version = NULL
WHERE study_id = %(study)s AND (status = 'stopped' OR %(trials)s > budget)

-- name: extend_timeout
-- Give a study more time; one that finished because time ran out is open again.
-- types: study int, timeout_s float8
UPDATE hpo.terms SET timeout_s = %(timeout_s)s,
    deadline = greatest(deadline, now()) + (%(timeout_s)s - coalesce(timeout_s, 0)) * interval '1 s',
    status = CASE WHEN status = 'finished' AND {out_of_time} THEN 'open' ELSE status END,
    promoted_version = CASE WHEN status = 'finished' AND {out_of_time} THEN NULL ELSE promoted_version END
WHERE study_id = %(study)s AND %(timeout_s)s > coalesce(timeout_s, 0)

-- name: set_status
-- Change a study's status where it has one of the earlier ones.
-- types: study int, status text, earlier text[]
UPDATE hpo.terms SET status = %(status)s WHERE study_id = %(study)s AND status = ANY(%(earlier)s)

-- name: forget_old_calls
-- Forget the calls of clients that are gone for a day.
DELETE FROM hpo.calls WHERE called_at < now() - interval '1 day'

-- name: forget_old_workers
-- Forget the workers that are gone for thirty days.
DELETE FROM hpo.workers WHERE seen_at < now() - interval '30 days'

-- name: register_worker
-- Make a worker known to displays.
-- types: worker text, study int, host text, pid int, device text, log text
INSERT INTO hpo.workers (worker, study_id, host, pid, device, log)
VALUES (%(worker)s, %(study)s, %(host)s, %(pid)s, %(device)s, %(log)s)
ON CONFLICT (worker) DO UPDATE SET study_id = excluded.study_id, host = excluded.host, pid = excluded.pid,
    device = excluded.device, log = excluded.log, started_at = now(), seen_at = now(), stopped_at = NULL

-- name: retire_worker
-- Note that a worker has ended.
-- types: worker text
UPDATE hpo.workers SET stopped_at = now(), seen_at = now() WHERE worker = %(worker)s

-- name: workers
-- The workers that were started for the study or hold one of its trials, oldest first.
-- types: study int
SELECT worker, host, pid, device, log, stopped_at IS NULL AND seen_at > clock_timestamp() - lease_s * interval '1 s'
FROM hpo.workers w JOIN hpo.terms s ON s.study_id = %(study)s
WHERE w.study_id = s.study_id OR EXISTS (
    SELECT FROM hpo.leases l WHERE l.study_id = s.study_id AND l.worker = w.worker)
ORDER BY started_at, worker

-- name: snapshot
-- A study at one moment: its terms, its trials by state, the best one, those in flight, its workers and its rate.
-- types: study int, recent int
SELECT s.study_id, n.study_name, s.status, s.budget, s.started, s.deadline,
    CASE WHEN s.deadline IS NOT NULL
        THEN greatest(0, extract(epoch FROM s.deadline - clock_timestamp()))::float8 END, s.promoted_version,
    (SELECT json_object_agg(state, n) FROM (SELECT state, count(*) AS n FROM trials t
        WHERE t.study_id = s.study_id GROUP BY state) c),
    (SELECT json_build_array(CASE v.value_type WHEN 'FINITE' THEN to_json(v.value) ELSE to_json(v.value_type) END,
            t.number)
        FROM trials t JOIN trial_values v USING (trial_id)
        WHERE t.study_id = s.study_id AND t.state = 'COMPLETE' AND v.objective = 0
        ORDER BY CASE WHEN d.direction = 'MAXIMIZE' THEN -1 ELSE 1 END
            * CASE v.value_type WHEN 'FINITE' THEN v.value WHEN 'INF_POS' THEN 'inf' ELSE '-inf' END, t.number
        LIMIT 1),
    (SELECT json_agg(json_build_array(t.number, l.worker, w.host, coalesce(l.device, w.device), l.attempt, l.epoch,
            CASE WHEN l.metric NOT IN ('NaN', 'Infinity', '-Infinity') THEN l.metric END,
            l.expires_at > clock_timestamp()) ORDER BY t.number)
        FROM hpo.leases l JOIN trials t USING (trial_id) LEFT JOIN hpo.workers w USING (worker)
        WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING'),
    (SELECT json_agg(json_build_array(host, device, n) ORDER BY host, device) FROM (SELECT host, device, count(*) AS n
        FROM hpo.workers w WHERE (w.study_id = s.study_id OR w.study_id IS NULL) AND w.stopped_at IS NULL
        AND w.seen_at > clock_timestamp() - s.lease_s * interval '1 s' GROUP BY host, device) p),
    least(r.n, %(recent)s) * 3600.0::float8
        / nullif(extract(epoch FROM e.ended - CASE WHEN r.n > %(recent)s THEN r.since ELSE e.started END)::float8, 0),
    e.started, e.ended
FROM hpo.terms s JOIN studies n USING (study_id)
    JOIN study_directions d ON d.study_id = s.study_id AND d.objective = 0
    CROSS JOIN LATERAL (SELECT min(t.datetime_start AT TIME ZONE 'UTC') AS started, max(l.ended_at) AS ended
        FROM hpo.leases l JOIN trials t USING (trial_id)
        WHERE l.study_id = s.study_id AND l.ended_at IS NOT NULL) e
    CROSS JOIN LATERAL (SELECT count(*) AS n, min(ended_at) AS since FROM (SELECT ended_at FROM hpo.leases l
        WHERE l.study_id = s.study_id AND ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT %(recent)s + 1) l) r
WHERE s.study_id = %(study)s
