// Parses workflows and actions with GitHub's own parser. Arguments: files. Prints their errors as
// a JSON array of {file, line, column, message}; exit code 0 without errors, 1 with, 2 when it
// could not look.
import { readFileSync } from "node:fs";
import { register } from "node:module";
import { basename } from "node:path";

// The parser imports JSON in a way that neither Node 20 nor 24 accepts; read it as a module.
const loader = `
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
export async function load(url, context, next) {
  if (!url.startsWith("file:") || !url.endsWith(".json")) return next(url, context);
  const source = "export default " + readFileSync(fileURLToPath(url), "utf8");
  return { format: "module", shortCircuit: true, source };
}`;
register("data:text/javascript," + encodeURIComponent(loader));

async function check(files) {
  const { parseWorkflow, convertWorkflowTemplate, NoOperationTraceWriter } =
    await import("@actions/workflow-parser");
  const { parseAction } = await import("@actions/workflow-parser/actions/action-parser");
  const { convertActionTemplate } = await import("@actions/workflow-parser/actions/action-template");
  const found = new Map();
  for (const name of files) {
    const file = { name, content: readFileSync(name, "utf8") };
    const isAction = /^action\.ya?ml$/.test(basename(name));
    const parsed = (isAction ? parseAction : parseWorkflow)(file, new NoOperationTraceWriter());
    if (parsed.value && isAction) {
      convertActionTemplate(parsed.context, parsed.value, { errorPolicy: 1 });
    } else if (parsed.value) {
      await convertWorkflowTemplate(parsed.context, parsed.value, undefined, { errorPolicy: 1 });
    }
    for (const error of parsed.context.errors.getErrors()) {
      const line = error.range?.start?.line ?? 1;
      const column = error.range?.start?.column ?? 1;
      const message = error.rawMessage ?? error.message;
      // One mistake is sometimes found twice.
      found.set(`${name}:${line}:${column}`, { file: name, line, column, message });
    }
  }
  return [...found.values()];
}

try {
  const errors = await check(process.argv.slice(2));
  console.log(JSON.stringify(errors));
  process.exitCode = errors.length ? 1 : 0;
} catch (error) {
  console.error(String(error?.stack ?? error));
  process.exitCode = 2;
}
