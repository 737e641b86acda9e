// Restores a photo and a batch with the client that @hey-api/openapi-ts made.
// Run as `node submit.js URL TOKEN OUTPUT PHOTO...`, beside the generated folder `client`.

import { readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";

import { getBatch, getResult, listBatchItems, submitBatch, submitRestoration } from "./client";
import { client } from "./client/client.gen";

async function main(url: string, token: string, output: string, photos: string[]): Promise<void> {
  client.setConfig({ baseUrl: url, auth: token, throwOnError: true });

  const one = await submitRestoration<true>({
    body: { image: fileOf(photos[0]!), output_format: "webp", keep_metadata: true },
    headers: { Prefer: "wait=30", "Idempotency-Key": "one" },
  });
  const job = one.data;
  if (job instanceof Blob || typeof job === "string") throw new Error("no job");
  expect(job.status === "succeeded" && job.output_format === "webp", job);
  await download(job.id, join(output, "one"));

  const submitted = await submitBatch<true>({
    body: {
      image: photos.map(fileOf),
      workflow: "enlarge",
      params: JSON.stringify({ scale: 2 }),
      run_limit_s: 60,
    },
  });
  const path = { batch_id: submitted.data.id };
  expect(submitted.data.size === photos.length, submitted.data);
  let batch = (await getBatch<true>({ path })).data;
  while (batch.status === "running") {
    await new Promise((resolve) => setTimeout(resolve, 100));
    batch = (await getBatch<true>({ path })).data;
  }
  expect(batch.status === "succeeded", batch);
  for (const item of (await listBatchItems<true>({ path })).data.items) {
    await download(item.job_id!, join(output, item.name));
  }
}

function fileOf(path: string): File {
  return new File([readFileSync(path)], basename(path), { type: "image/png" });
}

async function download(jobId: string, to: string): Promise<void> {
  const { data } = await getResult<true>({ path: { job_id: jobId }, query: { download: true } });
  expect(data instanceof Blob, data);
  writeFileSync(to, Buffer.from(await (data as Blob).arrayBuffer()));
}

function expect(holds: boolean, found: unknown): void {
  if (!holds) throw new Error(JSON.stringify(found));
}

const [url, token, output, ...photos] = process.argv.slice(2);
main(url!, token!, output!, photos).catch((error: unknown) => {
  console.error(error);
  process.exit(1);
});
