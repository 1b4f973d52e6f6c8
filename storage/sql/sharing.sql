-- How standing workers share the studies: among owners first, then by priority, then by age.

-- fragment: offers
-- Whether the study has a trial to take: one that is free, or one to start. Those in `held` are the caller's own.
NOT {capped} AND (s.status = 'open' AND s.started < s.budget AND NOT {out_of_time} AND {in_order}
    OR s.status IN ('open', 'exhausted') AND NOT {cut} AND EXISTS (SELECT FROM hpo.leases l
        WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND NOT {spent} AND l.trial_id <> ALL(%(held)s)
        AND ({free} OR {waited_for} <= hpo.moment())))

-- fragment: shared
-- The studies on which there may be work, but for those that the caller has set aside: whether each has a trial to take,
-- how many standing workers are at work for its owner, and when one last began a trial of his. All that nobody submitted
-- through the service are one owner's.
(SELECT *, sum(at_work) OVER whose AS served, max(taken_at) OVER whose AS served_at FROM (
    SELECT s.*, {offers} AS offers, (SELECT count(*) FROM hpo.leases l JOIN hpo.workers USING (worker)
        WHERE l.study_id = s.study_id AND {alive} AND workers.study_id IS NULL) AS at_work
    FROM hpo.terms s WHERE s.status IN ('open', 'exhausted') AND s.study_id <> ALL(%(aside)s)) s
WINDOW whose AS (PARTITION BY owner)) s

-- fragment: next
-- Of those with a trial to take: one of the owner for whom the fewest are at work, of equal ones whose last trial began
-- longest ago; of that owner's studies the one of the highest priority, of equal ones the oldest.
offers DESC, served, served_at NULLS FIRST, priority DESC, study_id

-- fragment: its_turn
-- Whether a standing worker takes the next trial from this study; all others take from theirs.
(NOT %(standing)s OR %(study)s = (SELECT study_id FROM {shared} ORDER BY {next} LIMIT 1))

-- name: turns
-- Ids and names of the studies that a standing worker looks at, in this order: those that wait to be promoted, which is
-- soon done, then those with a trial to take, then those that may have one later.
-- types: held int[], aside int[]
SELECT study_id, study_name FROM {shared} JOIN studies USING (study_id)
ORDER BY {trained} AND coalesce({promoter_silent}, true) DESC, {next}

-- name: share
-- How a study and its finals share the standing workers, and how many trials each may have at once; NULL: no limit.
-- types: study int, priority int, max_workers int
UPDATE hpo.terms SET priority = %(priority)s, max_workers = %(max_workers)s
WHERE study_id = %(study)s OR finals_of = %(study)s
