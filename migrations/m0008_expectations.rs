//! Why: a commit is one trip to the database. Whether what it built on still holds, as the lease of a result, is therefore
//! found out there, in its middle, and not by who sends it.

use sea_orm::DbBackend;

/// True when `count` is `wanted`; otherwise the statement, and with it the transaction, fails.
const POSTGRES: &str = "
CREATE FUNCTION found_for_each(what TEXT, count BIGINT, wanted BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
BEGIN
    IF count <> wanted THEN
        RAISE EXCEPTION 'not found for each row: %', what;
    END IF;
    RETURN TRUE;
END $$;
";

/// Takes what was expected and holds nothing. SQLite has no functions; and its older versions, which people look into the
/// file with, only know messages that stand here word by word.
const SQLITE: &str = "
CREATE VIEW expectations AS SELECT '' AS what, 0 AS expected, 0 AS found WHERE FALSE;
CREATE TRIGGER expectations_are_met INSTEAD OF INSERT ON expectations WHEN NEW.found <> NEW.expected BEGIN
    SELECT CASE NEW.what
        WHEN 'lease' THEN RAISE(ABORT, 'not found for each row: lease')
        WHEN 'name' THEN RAISE(ABORT, 'not found for each row: name')
        ELSE RAISE(ABORT, 'not found for each row')
    END;
END;
";

pub(super) fn schema(backend: DbBackend) -> String {
    if backend == DbBackend::Postgres { POSTGRES } else { SQLITE }.to_owned()
}
