-- Optuna's studies and trials, in Optuna's tables. Statements end with the result that their caller reads.

-- fragment: lock_study_row
SELECT FROM studies WHERE study_id = %(study)s FOR NO KEY UPDATE

-- fragment: trial_columns
t.trial_id, t.number, t.state, t.datetime_start, t.datetime_complete

-- fragment: trial_facts
-- What belongs to a trial but its reports, as JSON: values, parameters, user and system attributes.
    (SELECT json_agg(CASE value_type WHEN 'FINITE' THEN to_json(value) ELSE to_json(value_type) END ORDER BY objective)
     FROM trial_values d WHERE d.trial_id = t.trial_id),
    (SELECT json_agg(json_build_array(param_name, param_value, distribution_json) ORDER BY param_id)
     FROM trial_params d WHERE d.trial_id = t.trial_id),
    (SELECT json_object_agg(key, value_json) FROM trial_user_attributes d WHERE d.trial_id = t.trial_id),
    (SELECT json_object_agg(key, value_json) FROM trial_system_attributes d WHERE d.trial_id = t.trial_id)

-- fragment: trial_reports
    (SELECT json_object_agg(step, CASE intermediate_value_type
            WHEN 'FINITE' THEN to_json(intermediate_value) ELSE to_json(intermediate_value_type) END)
     FROM trial_intermediate_values d WHERE d.trial_id = t.trial_id)

-- fragment: trial_details
-- All that belongs to a trial.
json_build_array({trial_facts}, {trial_reports})

-- name: trial
-- One trial with its details, and the study that it belongs to.
-- prepared: trial int
SELECT {trial_columns}, {trial_details}, t.study_id FROM trials t WHERE t.trial_id = %(trial)s

-- name: changed_trials
-- New trials, and those known as unfinished that now have one of the states, but for those in `drawn` that still run;
-- details for these states only, reports of running trials only where they are asked for. With each the ids of all
-- trials that were dropped, and whether one of our workers has taken it.
-- prepared: study int, next int, unfinished int[], ahead int[], states trialstate[], drawn int[], reports bool
SELECT {trial_columns}, CASE WHEN t.state = ANY(%(states)s) THEN json_build_array({trial_facts},
        CASE WHEN %(reports)s OR t.state <> 'RUNNING' THEN {trial_reports} END) END,
    (SELECT array_agg(trial_id) FROM hpo.dropped WHERE study_id = %(study)s),
    EXISTS (SELECT FROM hpo.leases l WHERE l.trial_id = t.trial_id)
FROM studies s LEFT JOIN LATERAL (
    SELECT * FROM trials WHERE study_id = s.study_id AND number >= %(next)s AND trial_id <> ALL(%(ahead)s)
    UNION ALL
    SELECT * FROM trials WHERE trial_id = ANY(%(unfinished)s) AND state = ANY(%(states)s)
        AND (state <> 'RUNNING' OR trial_id <> ALL(%(drawn)s))
) t ON true
WHERE s.study_id = %(study)s ORDER BY t.number

-- name: trial_page
-- The trials of a study from a number on, with their details, and how many trials the study has.
-- types: study int, first bigint, most int
SELECT {trial_columns}, {trial_details}, (SELECT count(*) FROM trials WHERE study_id = s.study_id)
FROM studies s LEFT JOIN LATERAL (SELECT * FROM trials WHERE study_id = s.study_id AND number >= %(first)s
    ORDER BY number LIMIT %(most)s) t ON true
WHERE s.study_id = %(study)s ORDER BY t.number

-- name: trial_id
-- The id of the trial of that number in a study.
-- types: study int, number int
SELECT trial_id FROM trials WHERE study_id = %(study)s AND number = %(number)s

-- name: trial_owner
-- Study, number and state of a trial.
-- types: trial int
SELECT study_id, number, state FROM trials WHERE trial_id = %(trial)s

-- name: earlier_distribution
-- A distribution that the parameter of that name has had in the study.
-- types: study int, name text
SELECT distribution_json FROM trial_params JOIN trials USING (trial_id)
WHERE study_id = %(study)s AND param_name = %(name)s LIMIT 1

-- name: call_result
-- What the call has left as its result: the last statement of a call that happens once.
-- prepared: client uuid, call bigint
SELECT result FROM hpo.calls WHERE {this_call}

-- name: lock_study
-- Lock the study's row, as stock Optuna does too, so that the next statement sees the trials committed meanwhile.
-- types: study int
{lock_study_row}

-- fragment: new_trial_id
-- Claim the call, with the id of the trial that it makes.
claim AS (INSERT INTO hpo.calls (client, call, result)
    SELECT %(client)s, %(call)s, nextval('trials_trial_id_seq') FROM studies WHERE study_id = %(study)s {claim}
    RETURNING result AS trial_id)

-- fragment: next_number
coalesce((SELECT max(number) + 1 FROM trials WHERE study_id = %(study)s), 0)

-- name: new_trial
-- Make a trial that starts now.
-- prepared: study int, client uuid, call bigint, state text, complete timestamp
WITH {new_trial_id},
trial AS (INSERT INTO trials (trial_id, study_id, number, state, datetime_start, datetime_complete)
    SELECT trial_id, %(study)s, {next_number}, %(state)s::trialstate, {utc_now}, %(complete)s FROM claim
    RETURNING trial_id)
SELECT FROM trial

-- name: copy_trial
-- Make a trial like a template, with all that belongs to it.
-- prepared: study int, client uuid, call bigint, state text, start timestamp, complete timestamp, v_value float8[],
--     v_type text[], p_name text[], p_value float8[], p_text text[], user_key text[], user_text text[], system_key
--     text[], system_text text[], r_step int[], r_value float8[], r_type text[]
WITH {new_trial_id},
trial AS (INSERT INTO trials (trial_id, study_id, number, state, datetime_start, datetime_complete)
    SELECT trial_id, %(study)s, {next_number}, %(state)s::trialstate, %(start)s, %(complete)s FROM claim
    RETURNING trial_id),
trial_value AS (INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, n - 1, value, type::trialvaluetype
    FROM trial, unnest(%(v_value)s, %(v_type)s) WITH ORDINALITY AS v (value, type, n)),
params AS (INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, name, value, text
    FROM trial, unnest(%(p_name)s, %(p_value)s, %(p_text)s) WITH ORDINALITY AS p (name, value, text, n) ORDER BY n),
users AS (INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, key, text FROM trial, unnest(%(user_key)s, %(user_text)s) AS a (key, text)),
systems AS (INSERT INTO trial_system_attributes (trial_id, key, value_json)
    SELECT trial_id, key, text FROM trial, unnest(%(system_key)s, %(system_text)s) AS a (key, text)),
reports AS (INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, step, value, type::trialintermediatevaluetype
    FROM trial, unnest(%(r_step)s, %(r_value)s, %(r_type)s) AS r (step, value, type))
SELECT FROM trial

-- name: name_lease
-- Name the lease under which a trial's state is changed, for the guard on Optuna's table.
-- prepared: trial int, attempt int, worker text
SELECT set_config('hpo.lease', concat_ws('/', %(trial)s, %(attempt)s, %(worker)s), true)

-- name: set_state
-- Set a trial's state and values and end its lease with it: under a fence only while that lease holds, locked against
-- an adopter.
-- prepared: trial int, attempt int, worker text, state text, finished bool, earlier trialstate[], v_value float8[],
--     v_type text[], client uuid, call bigint
WITH fence AS (SELECT trial_id FROM hpo.leases WHERE trial_id = %(trial)s
    AND attempt = %(attempt)s AND worker = %(worker)s AND ended_at IS NULL AND NOT released FOR UPDATE),
foreign_lease AS (SELECT FROM hpo.leases WHERE trial_id = %(trial)s AND ended_at IS NULL AND %(attempt)s IS NULL),
changed AS (UPDATE trials SET state = %(state)s::trialstate,
        datetime_start = CASE WHEN %(state)s = 'RUNNING' THEN {utc_now} ELSE datetime_start END,
        datetime_complete = CASE WHEN %(finished)s THEN {utc_now} ELSE datetime_complete END
    WHERE trial_id = %(trial)s AND state = ANY(%(earlier)s)
    AND CASE WHEN %(attempt)s IS NULL THEN NOT EXISTS (TABLE foreign_lease) ELSE EXISTS (TABLE fence) END
    RETURNING trial_id),
result AS (INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, n - 1, value, type::trialvaluetype
    FROM changed, unnest(%(v_value)s::float8[], %(v_type)s::text[]) WITH ORDINALITY AS v (value, type, n)
    ON CONFLICT (trial_id, objective) DO UPDATE SET value = excluded.value, value_type = excluded.value_type),
lease AS (UPDATE hpo.leases l SET ended_at = hpo.clock() FROM changed c
    WHERE l.trial_id = c.trial_id AND %(finished)s)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM changed {claim}

-- fragment: writable
-- The trials of a batch that may be written to, locked until the writes are committed: those with a lease by their
-- lease (an adopter waits), the others by their state.
batch AS (SELECT * FROM unnest(%(trials)s::int[], %(attempts)s::int[], %(workers)s::text[])
    AS b (trial_id, attempt, worker)),
free AS (SELECT t.trial_id FROM batch b JOIN trials t USING (trial_id)
    WHERE b.attempt IS NULL AND t.state IN ('RUNNING', 'WAITING') FOR SHARE OF t),
leased AS (SELECT l.trial_id FROM batch b JOIN hpo.leases l USING (trial_id) JOIN trials t USING (trial_id)
    WHERE l.attempt = b.attempt AND l.worker = b.worker AND l.ended_at IS NULL AND NOT l.released
    AND t.state = 'RUNNING' FOR SHARE OF l),
writable AS (TABLE free UNION ALL TABLE leased)

-- fragment: write_reports
reports AS (INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, step, value, type::trialintermediatevaluetype
    FROM unnest(%(r_trial)s::int[], %(r_step)s::int[], %(r_value)s::float8[], %(r_type)s::text[])
        AS r (trial_id, step, value, type) JOIN writable USING (trial_id)
    ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value,
        intermediate_value_type = excluded.intermediate_value_type)

-- fragment: all_writable
-- All or nothing: where a trial of the batch may not be written to, the division by zero undoes the whole.
SELECT 1 / (count(*) = %(count)s)::int FROM writable

-- name: reports
-- Write a batch of reports.
-- prepared: trials int[], attempts int[], workers text[], count int, r_trial int[], r_step int[], r_value float8[],
--     r_type text[]
WITH {writable},
{write_reports}
{all_writable}

-- name: write
-- Write a batch of parameters, attributes and reports.
-- prepared: trials int[], attempts int[], workers text[], count int, p_trial int[], p_name text[], p_value float8[],
--     p_text text[], user_trial int[], user_key text[], user_text text[], system_trial int[], system_key text[],
--     system_text text[], r_trial int[], r_step int[], r_value float8[], r_type text[]
WITH {writable},
params AS (INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, name, value, distribution
    FROM unnest(%(p_trial)s::int[], %(p_name)s::text[], %(p_value)s::float8[], %(p_text)s::text[])
        WITH ORDINALITY AS p (trial_id, name, value, distribution, n) JOIN writable USING (trial_id) ORDER BY n
    ON CONFLICT (trial_id, param_name)
    DO UPDATE SET param_value = excluded.param_value, distribution_json = excluded.distribution_json),
users AS (INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, key, value
    FROM unnest(%(user_trial)s::int[], %(user_key)s::text[], %(user_text)s::text[])
        WITH ORDINALITY AS a (trial_id, key, value, n) JOIN writable USING (trial_id) ORDER BY n
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json),
systems AS (INSERT INTO trial_system_attributes (trial_id, key, value_json)
    SELECT trial_id, key, value
    FROM unnest(%(system_trial)s::int[], %(system_key)s::text[], %(system_text)s::text[])
        WITH ORDINALITY AS a (trial_id, key, value, n) JOIN writable USING (trial_id) ORDER BY n
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json),
{write_reports}
{all_writable}

-- name: new_study
-- Make a study with its directions.
-- types: client uuid, call bigint, name text, directions text[]
WITH claim AS (INSERT INTO hpo.calls (client, call, result)
    SELECT %(client)s, %(call)s, nextval('studies_study_id_seq') {claim} RETURNING result),
study AS (INSERT INTO studies (study_id, study_name) SELECT result, %(name)s FROM claim)
INSERT INTO study_directions (study_id, objective, direction)
SELECT result, n - 1, d::studydirection FROM claim, unnest(%(directions)s::text[]) WITH ORDINALITY AS d (d, n)

-- name: lock_study_to_delete
-- Lock the study's row against all that make trials in it.
-- types: study int
SELECT FROM studies WHERE study_id = %(study)s FOR UPDATE

-- name: delete_study
-- Remove a study and all that belongs to it; our own tables follow by their foreign keys.
-- types: study int, client uuid, call bigint
WITH gone AS (SELECT trial_id FROM trials WHERE study_id = %(study)s),
values_gone AS (DELETE FROM trial_values d USING gone WHERE d.trial_id = gone.trial_id),
params_gone AS (DELETE FROM trial_params d USING gone WHERE d.trial_id = gone.trial_id),
trial_users_gone AS (DELETE FROM trial_user_attributes d USING gone WHERE d.trial_id = gone.trial_id),
trial_systems_gone AS (DELETE FROM trial_system_attributes d USING gone WHERE d.trial_id = gone.trial_id),
reports_gone AS (DELETE FROM trial_intermediate_values d USING gone WHERE d.trial_id = gone.trial_id),
heartbeats_gone AS (DELETE FROM trial_heartbeats d USING gone WHERE d.trial_id = gone.trial_id),
trials_gone AS (DELETE FROM trials WHERE study_id = %(study)s),
directions_gone AS (DELETE FROM study_directions WHERE study_id = %(study)s),
users_gone AS (DELETE FROM study_user_attributes WHERE study_id = %(study)s),
systems_gone AS (DELETE FROM study_system_attributes WHERE study_id = %(study)s),
study_gone AS (DELETE FROM studies WHERE study_id = %(study)s RETURNING study_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, study_id FROM study_gone {claim}

-- name: study_id
-- The id of the study of that name.
-- types: name text
SELECT study_id FROM studies WHERE study_name = %(name)s

-- name: study_name
-- The name of a study.
-- types: study int
SELECT study_name FROM studies WHERE study_id = %(study)s

-- name: study_directions
-- The directions of a study's objectives.
-- types: study int
SELECT direction FROM study_directions WHERE study_id = %(study)s ORDER BY objective

-- name: all_studies
-- Every study with its directions and attributes.
SELECT s.study_id, s.study_name,
    (SELECT json_agg(direction ORDER BY objective) FROM study_directions d WHERE d.study_id = s.study_id),
    (SELECT json_object_agg(key, value_json) FROM study_user_attributes a WHERE a.study_id = s.study_id),
    (SELECT json_object_agg(key, value_json) FROM study_system_attributes a WHERE a.study_id = s.study_id)
FROM studies s ORDER BY s.study_id

-- name: study_user_attributes
-- The user attributes of a study; one row without a key where it has none.
-- types: study int
SELECT a.key, a.value_json FROM studies s LEFT JOIN study_user_attributes a USING (study_id)
WHERE s.study_id = %(study)s

-- name: study_system_attributes
-- The system attributes of a study; one row without a key where it has none.
-- types: study int
SELECT a.key, a.value_json FROM studies s LEFT JOIN study_system_attributes a USING (study_id)
WHERE s.study_id = %(study)s

-- name: set_study_user_attribute
-- Set a user attribute of a study; no row where there is no such study.
-- types: study int, key text, text text
INSERT INTO study_user_attributes (study_id, key, value_json)
SELECT study_id, %(key)s, %(text)s FROM studies WHERE study_id = %(study)s
ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json RETURNING study_id

-- name: set_study_system_attribute
-- Set a system attribute of a study; no row where there is no such study.
-- types: study int, key text, text text
INSERT INTO study_system_attributes (study_id, key, value_json)
SELECT study_id, %(key)s, %(text)s FROM studies WHERE study_id = %(study)s
ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json RETURNING study_id
