// An OpenID provider for tests. `node oidc-provider.mjs AUDIENCE` prints its issuer and answers
// until its standard input ends. People log in with any name and password; whoever is called
// "ada-ROLE" gets the role of that name. Programs log in as "machine" with the secret "machine-secret".

import { createServer } from 'node:http';
import { Provider } from 'oidc-provider';

const audience = process.argv[2];
const server = createServer();
await new Promise((listening) => server.listen(0, '127.0.0.1', listening));
const issuer = `http://127.0.0.1:${server.address().port}`;

const provider = new Provider(issuer, {
  clients: [
    {
      client_id: 'people',
      application_type: 'native',
      token_endpoint_auth_method: 'none',
      grant_types: ['authorization_code'],
      response_types: ['code'],
      redirect_uris: ['http://127.0.0.1/callback'],
    },
    {
      client_id: 'machine',
      client_secret: 'machine-secret',
      grant_types: ['client_credentials'],
      response_types: [],
      redirect_uris: [],
    },
  ],
  cookies: { keys: ['of these tests'] },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (context, resource) => {
        if (resource !== audience) throw new Error(`not known: ${resource}`);
        return { scope: 'orders', accessTokenFormat: 'jwt', accessTokenTTL: 600 };
      },
    },
  },
  pkce: { required: () => true },
  findAccount: (context, accountId) => ({
    accountId,
    claims: () => ({ sub: accountId }),
  }),
  extraTokenClaims: (context, token) => {
    const name = token.accountId ?? 'machine-clerk';
    return { roles: [name.split('-').at(-1)] };
  },
});

server.on('request', provider.callback());
process.stdout.write(`${issuer}\n`);
process.stdin.resume().on('end', () => process.exit());
