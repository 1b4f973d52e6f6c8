-- What people change of a study that exists: trials that no longer count, a wider space. Each change goes together with
-- lock_study in one transaction.

-- fragment: ended_trials
-- Those of the wanted trials that have ended.
(SELECT trial_id, number FROM trials
    WHERE study_id = %(study)s AND number = ANY(%(numbers)s) AND state IN ('COMPLETE', 'PRUNED', 'FAIL'))

-- fragment: note_trials
-- The record of a change of the trials in `changed`.
INSERT INTO hpo.changes (study_id, changed_by, what, detail)
SELECT %(study)s, %(who)s, what, jsonb_build_object('trials', jsonb_agg(number ORDER BY number)) || jsonb_strip_nulls(
    jsonb_build_object('reason', max(reason)))
FROM changed GROUP BY what

-- name: drop_trials
-- Let trials count no more: all of them or, where one has not ended, none. One that was dropped stays as it is.
-- types: study int, numbers int[], reason text, who text, client uuid, call bigint
WITH ended AS {ended_trials},
dropped AS (INSERT INTO hpo.dropped (trial_id, study_id, reason, dropped_by)
    SELECT trial_id, %(study)s, %(reason)s, %(who)s FROM ended
    WHERE (SELECT count(*) FROM ended) = cardinality(%(numbers)s::int[])
    AND NOT EXISTS (SELECT FROM hpo.calls WHERE {this_call})
    ON CONFLICT DO NOTHING RETURNING trial_id),
changed AS (SELECT number, 'drop' AS what, %(reason)s::text AS reason FROM dropped JOIN ended USING (trial_id)),
noted AS ({note_trials})
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, count(*) FROM dropped {claim}

-- name: restore_trials
-- Let trials count again: all of them or, where one has not ended, none.
-- types: study int, numbers int[], who text, client uuid, call bigint
WITH ended AS {ended_trials},
restored AS (DELETE FROM hpo.dropped d USING ended e WHERE d.trial_id = e.trial_id
    AND (SELECT count(*) FROM ended) = cardinality(%(numbers)s::int[])
    AND NOT EXISTS (SELECT FROM hpo.calls WHERE {this_call}) RETURNING number),
changed AS (SELECT number, 'restore' AS what, NULL::text AS reason FROM restored),
noted AS ({note_trials})
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, count(*) FROM restored {claim}

-- name: widen_study
-- Store a plan with a wider space in place of the one of that revision, with the record of it. A study that had no
-- configuration left to try, or brought nothing more, but has trials left, is open again. Its patience begins anew.
-- types: study int, revision int, config jsonb, detail jsonb, who text
WITH wider AS (UPDATE hpo.terms s SET config = %(config)s, status = CASE WHEN o.goes_on THEN 'open' ELSE status END,
        patient_from = {next_number}, standstill = CASE WHEN NOT o.goes_on THEN standstill END,
        promoter = CASE WHEN NOT o.goes_on THEN promoter END,
        promoter_expires_at = CASE WHEN NOT o.goes_on THEN promoter_expires_at END,
        promoted_version = CASE WHEN NOT o.goes_on THEN promoted_version END
    FROM (SELECT study_id, status = 'exhausted' OR status = 'finished' AND started < budget AND NOT {out_of_time}
        AS goes_on FROM hpo.terms WHERE study_id = %(study)s FOR NO KEY UPDATE) o
    WHERE s.study_id = o.study_id AND {revision} = %(revision)s RETURNING s.study_id, started)
INSERT INTO hpo.changes (study_id, changed_by, what, detail)
SELECT study_id, %(who)s, 'widen', jsonb_build_object('space', %(detail)s::jsonb, 'started', started) FROM wider

-- fragment: revision
-- How often the space of a study was widened, or its limits changed.
coalesce((s.config ->> 'revision')::int, 0)

-- name: exhaust_study
-- Note that no configuration is left to try in the space of that revision.
-- types: study int, revision int
UPDATE hpo.terms s SET status = 'exhausted'
WHERE study_id = %(study)s AND status = 'open' AND {revision} = %(revision)s

-- name: changes
-- What was changed of a study, oldest first.
-- types: study int
SELECT changed_at, changed_by, what, detail FROM hpo.changes WHERE study_id = %(study)s ORDER BY change

-- name: trials_as_they_are
-- Number and state of the wanted trials, and how many trials the study has.
-- types: study int, numbers int[]
SELECT number, state, (SELECT count(*) FROM trials WHERE study_id = %(study)s)
FROM studies s LEFT JOIN trials t ON t.study_id = s.study_id AND number = ANY(%(numbers)s)
WHERE s.study_id = %(study)s ORDER BY number

-- name: dropped_trials
-- The trials of a study that do not count, and why.
-- types: study int
SELECT number, reason, dropped_by, dropped_at FROM hpo.dropped JOIN trials USING (trial_id)
WHERE hpo.dropped.study_id = %(study)s ORDER BY number
