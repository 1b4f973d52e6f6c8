-- The numbers that the service's /metrics tells of the whole database.

-- name: metrics
-- Studies by status, trials of ours by state, those held and those that may still begin, workers alive, notices by
-- state. A standing worker is alive where it was heard of in the last minute, one of a study in the time of its lease.
SELECT (SELECT json_object_agg(status, n) FROM (SELECT status, count(*) AS n FROM hpo.terms GROUP BY status) s),
    (SELECT json_object_agg(state, n) FROM (SELECT state, count(*) AS n FROM trials
        WHERE study_id IN (SELECT study_id FROM hpo.terms) GROUP BY state) t),
    (SELECT count(*) FROM hpo.leases WHERE ended_at IS NULL),
    (SELECT coalesce(sum(greatest(0, budget - started)), 0) FROM hpo.terms WHERE status = 'open'),
    (SELECT count(*) FROM hpo.workers w LEFT JOIN hpo.terms s USING (study_id) WHERE stopped_at IS NULL
        AND seen_at > hpo.clock() - coalesce(lease_s, 60) * interval '1 s'),
    (SELECT json_object_agg(state, n) FROM (SELECT CASE WHEN delivered_at IS NOT NULL THEN 'delivered'
            WHEN next_at IS NULL THEN 'given up' ELSE 'waiting' END AS state, count(*) AS n
        FROM hpo.notices GROUP BY 1) n)
