-- name: rights
-- Whether the role may read and write each of Optuna's tables and ours, and count in their sequences.
SELECT c.oid::regclass::text, CASE WHEN c.relkind = 'S' THEN true ELSE has_table_privilege(c.oid, 'SELECT') END,
    CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, 'USAGE')
        ELSE has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')
            AND has_table_privilege(c.oid, 'DELETE') END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'S') AND (n.nspname = 'hpo' OR n.nspname = current_schema() AND c.relname LIKE ANY (ARRAY[
    'studies%%', 'study\_%%', 'trials%%', 'trial\_%%'])) AND c.relname <> 'revision'
ORDER BY 1
