-- Promoted model versions and their aliases. Writers of a name take turns: lock_model goes ahead of what they write,
-- in the same round trip and transaction.

-- fragment: versions
-- What the groups of the data are called only group_names tells: they may be people; and values of the data diagnosis.
SELECT name, version, study_id, study_name, trial_number, created_at, scores,
    config - ARRAY['group_names', 'diagnosis'], artifacts,
    ARRAY(SELECT alias FROM hpo.aliases a WHERE a.name = m.name AND a.version = m.version ORDER BY alias)
FROM hpo.models m

-- fragment: same_model
-- The version of that name that was made of the same trial and the same files, but for what the report says by now.
name = %(name)s AND study_id = %(study)s AND trial_number = %(trial_number)s
    AND artifacts - ARRAY['report.html', 'SHA256SUMS'] = %(artifacts)s::jsonb - ARRAY['report.html', 'SHA256SUMS']

-- fragment: looks
-- How many versions, this one among them, were measured on the same test part; earlier ones said only of which study.
(SELECT jsonb_build_object('test_looks', 1 + count(*)) FROM hpo.models m
    WHERE m.scores ->> 'test_part' = %(scores)s::jsonb ->> 'test_part'
    OR NOT jsonb_exists(m.scores, 'test_part') AND m.study_id = %(study)s AND m.scores -> 'test' <> 'null'
    HAVING %(scores)s::jsonb ->> 'test_part' IS NOT NULL)

-- name: lock_model
-- One writer of a name at a time, until the transaction's end.
-- types: name text
SELECT pg_advisory_xact_lock(hashtextextended('hpo.models ' || %(name)s, 0))

-- name: add_version
-- Add the next version of a name, unless the same trial with the same files is a version already; as the latest if it
-- is to be, or the only one. Its scores say how many versions' models have now looked at the test part.
-- types: name text, study int, study_name text, trial_number int, scores jsonb, config jsonb, artifacts jsonb, latest bool
WITH added AS (INSERT INTO hpo.models
        (name, version, study_id, study_name, trial_number, scores, config, artifacts)
    SELECT %(name)s, 1 + coalesce((SELECT max(version) FROM hpo.models WHERE name = %(name)s), 0), %(study)s,
        %(study_name)s, %(trial_number)s, %(scores)s::jsonb || coalesce({looks}, '{}'), %(config)s, %(artifacts)s
    WHERE NOT EXISTS (SELECT FROM hpo.models WHERE {same_model}) RETURNING name, version)
INSERT INTO hpo.aliases (name, alias, version) SELECT name, 'latest', version FROM added
ON CONFLICT (name, alias) DO UPDATE SET version = excluded.version WHERE %(latest)s

-- name: renew_report
-- The newest report, with the sums that hold for it, for the version that was made of this trial and these files: an
-- earlier one's may be damaged.
-- types: name text, study int, trial_number int, artifacts jsonb
UPDATE hpo.models SET artifacts = %(artifacts)s WHERE {same_model} AND jsonb_exists(%(artifacts)s, 'report.html')

-- name: added_version
-- The newest version that was made of this trial and these files.
-- types: name text, study int, trial_number int, artifacts jsonb
{versions} WHERE {same_model} ORDER BY version DESC LIMIT 1

-- name: all_versions
-- Every version of every name.
{versions} ORDER BY name, version

-- name: versions_of
-- Every version of one name.
-- types: name text
{versions} WHERE name = %(name)s ORDER BY version

-- name: group_names
-- What the groups are called whose scores a version's files hold, by part of the data.
-- types: name text, version int
SELECT config -> 'group_names' FROM hpo.models WHERE name = %(name)s AND version = %(version)s

-- name: diagnosis
-- What a report draws of a version's predictions.
-- types: name text, version int
SELECT config -> 'diagnosis' FROM hpo.models WHERE name = %(name)s AND version = %(version)s

-- name: model_names
-- The names that there are.
SELECT DISTINCT name FROM hpo.models ORDER BY name

-- name: set_alias
-- Let an alias name the wanted version, which is given by its number or by another alias.
-- types: name text, alias text, wanted text
INSERT INTO hpo.aliases (name, alias, version)
SELECT name, %(alias)s, version FROM hpo.models m
WHERE name = %(name)s AND (version::text = %(wanted)s OR EXISTS (SELECT FROM hpo.aliases a
    WHERE a.name = m.name AND a.version = m.version AND a.alias = %(wanted)s))
ON CONFLICT (name, alias) DO UPDATE SET version = excluded.version

-- name: drop_alias
-- Let an alias name nothing.
-- types: name text, alias text
DELETE FROM hpo.aliases WHERE name = %(name)s AND alias = %(alias)s

-- name: alias_changes
-- Which versions the aliases of a name have named, the newest first.
-- types: name text
SELECT alias, version, changed_at FROM hpo.alias_changes WHERE name = %(name)s ORDER BY change DESC

-- name: delete_versions
-- Remove versions, each known by its number and the time at which it was made, as numbers may be given again; none that
-- an alias names, but for "latest".
-- types: name text, versions int[], created timestamptz[]
DELETE FROM hpo.models m USING unnest(%(versions)s::int[], %(created)s::timestamptz[]) AS d (version, created_at)
WHERE m.name = %(name)s AND m.version = d.version AND m.created_at = d.created_at
    AND NOT EXISTS (SELECT FROM hpo.aliases a
        WHERE a.name = m.name AND a.version = m.version AND a.alias <> 'latest')

-- name: latest_is_newest
-- Let "latest" name the newest version that is left.
-- types: name text
INSERT INTO hpo.aliases (name, alias, version)
SELECT name, 'latest', max(version) FROM hpo.models WHERE name = %(name)s GROUP BY name
ON CONFLICT (name, alias) DO UPDATE SET version = excluded.version

-- name: kept_artifacts
-- The keys that versions of any name still hold.
SELECT DISTINCT key FROM hpo.models, jsonb_each_text(artifacts) AS a (file, key)
